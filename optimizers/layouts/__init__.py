"""Layouts: which process holds which part of each matrix, and the collectives that answer a rule's requests."""
