"""What a run leaves behind: the run folder, its mirror in W&B, and the live log."""
