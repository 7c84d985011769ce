"""What a run would need, before it starts: `optbench plan`."""
