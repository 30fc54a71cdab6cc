"""Matmul kernels for GPUs, written in Triton, which is imported only when they are used."""
