"""Checkpoints: what a run needs to continue exactly where it stopped, on any engine and number of processes."""
