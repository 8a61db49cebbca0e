"""Kernels as torch operations, for GPUs and for what the CPU's own kernels do not cover."""
