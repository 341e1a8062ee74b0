"""The GPU backend: Triton kernels compiled ahead of time to cubins."""
