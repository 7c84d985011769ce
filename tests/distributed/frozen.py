"""Imported last by the process that tests fork from: what every fork would do again, and a collection of the rest."""

import gc

from harness.record import certificates

# Every run compares it with that of the certificates: a third of a second, remembered by the sources' text.
certificates.sources_sha256()

# A fork then neither looks at what was imported nor copies it.
gc.collect()
gc.freeze()
