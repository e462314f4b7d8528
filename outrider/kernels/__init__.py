"""Kernels, one operation a file: contract, plain-torch reference, Triton kernel, launcher."""
