"""The GPU check: prove on a GPU, in 12 minutes, what a CPU cannot (``make gpu-check``, docs/gpu.md)."""
