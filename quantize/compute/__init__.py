"""The arithmetic: kernels for the CPU and for GPUs, and which device runs them."""
