"""Checks and figures that need a CUDA device. Each module is a program: `python -m benchmarks.gpu.check`."""
