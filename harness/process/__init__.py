"""This process among those of its run: signals, signs of life, exit markers, and who started it. Torch-free."""
