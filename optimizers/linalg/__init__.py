"""Batched linear algebra of the update rules: polar factors, polynomial iterations, bases, spectra.

Import from the modules: `optimizers.linalg.polar`, `newton_schulz`, `inverse_root`, `dwh`,
`subspace`, `spectra`.
"""
