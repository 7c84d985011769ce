"""How matrices are held over processes: the few sums and exchanges that a rule asks for."""
