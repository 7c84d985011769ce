"""Checkpoints: what a run needs to go on exactly where it was, on any engine and number of processes."""
