"""Public logs of other trainers: one reader for each format, and what they have in common."""
