"""docs/RESULTS.md: measured results, computed from the summaries in docs/results/."""
