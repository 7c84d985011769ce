"""Probes: progress, validation loss, spectra of the moments, memory, FLOPs."""
