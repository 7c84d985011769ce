"""The report of a comparison: one HTML page, tables, and the command `optbench report`."""
