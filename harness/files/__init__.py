"""Files: written whole or not at all, locked, read within limits, found by pattern, hashed. Torch-free."""
