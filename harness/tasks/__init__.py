"""Tasks: what a run learns, and how its result is measured."""
