"""Train the runs of a comparison one after the other."""
