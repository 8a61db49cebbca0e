"""The kernels of this package, compiled by LLVM for the CPU at hand."""
