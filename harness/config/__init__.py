"""Configuration: the keys of a run (`schema`), how overrides and files set them (`compose`), and their checks.

Nothing below this package imports torch.
"""
