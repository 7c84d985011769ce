"""Files that are written whole or not at all, locked, or read within limits. Torch-free."""
