"""When can training data be reconstructed from weights, and when not: `optbench reconstruct`.

After "No Prior, No Leakage: Revisiting Reconstruction Attacks in Trained Neural Networks" (Refael, Smorodinsky,
Lindenbaum, Safran 2025, arXiv 2509.21296) and the attack of Haim et al. 2022 (arXiv 2206.07758).
"""
