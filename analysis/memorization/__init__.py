"""What a language model memorizes, by optimizer: canaries, verbatim extraction, membership (`optbench memorize`)."""
