"""Triton kernels of fastspec; installed as `fastspec.kernels`."""

MAX_RANK = 256  # the widest projection that a kernel takes
