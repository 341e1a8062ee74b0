"""Packages for GPUs against the bandwidth and the matrix rate of the GPU that they run on, and against PyTorch.

`prepare` needs the compiler and no GPU, `run` a GPU and no compiler, `report` neither. See ../README.md.
"""
