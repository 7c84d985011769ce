"""`optbench compare`: train several optimizers under one protocol, one run after the other."""
