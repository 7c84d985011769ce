"""Starting runs: the launcher's command line and what became of the processes."""
