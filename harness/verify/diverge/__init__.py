"""`optbench diverge`: is the difference between two runs rounding, or does one of them compute something else?"""
