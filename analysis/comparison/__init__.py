"""Compare runs: group them into sets, test the differences, and judge each set."""
