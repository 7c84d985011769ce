"""Imported last by the process that tests fork from: a fork then neither collects nor copies what was imported."""

import gc

gc.collect()
gc.freeze()
