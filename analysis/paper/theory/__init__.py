"""`optbench paper sumo_theory`: SUMO's lemmas and figures (arXiv 2505.24749), simulated and on real moments."""
