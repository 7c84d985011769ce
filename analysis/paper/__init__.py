"""`optbench paper`: a published table, cell by cell next to the predicted and measured values."""
