"""Triton kernels of fastspec; installed as `fastspec.kernels`."""
