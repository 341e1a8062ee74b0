"""From a lowered graph to kernels, a plan and a package."""
