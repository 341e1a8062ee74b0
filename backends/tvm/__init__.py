"""The CPU backend: TIR kernels compiled by TVM."""
