"""`optbench sweep`: several optimizers tuned with equal budgets, then compared on fresh seeds."""
