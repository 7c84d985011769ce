"""`optbench submit`: runs, comparisons, tuning studies and other commands as SLURM jobs."""
