"""Matrices whose singular triplets are known."""

import torch

from fastspec.studies.analyze.weights import Pair


def orthonormal(m, k, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]


def matrix(s, m, n, seed=0):
    """(W, U, V) with the singular values `s`."""
    s = torch.as_tensor(s, dtype=torch.float64)
    u, v = orthonormal(m, len(s), seed), orthonormal(n, len(s), seed + 1)
    return (u * s) @ v.mT, u, v


def pair(before, after):
    return Pair("layer.3.attention.weight", "attention", 3, before, after)
