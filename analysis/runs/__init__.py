"""Runs below a folder, read for analysis: run folders, tables of other trainers, tuning ledgers."""
