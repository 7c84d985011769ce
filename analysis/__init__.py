"""Many runs: what is read from run folders, compared and reported."""
