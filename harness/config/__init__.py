"""Configuration: what a run can be told (`schema`), how it is said (`compose`), whether it works (`checks`).

Nothing below this package imports torch.
"""
