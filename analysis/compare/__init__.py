"""From run folders to statistics, tables and a report."""
