"""Singular triplets from a subspace, and the subspace from the Gram matrix (design section 4).

Every function works on a stack `w [L, m, n]` with m >= n: the short side is last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Left vectors of values below this part of the largest are orthonormalised by Householder
# reflections: dividing by s_i leaves |u_i . u_j| up to eps s_1^2 / (s_i s_j), 1e-8 here.
_SMALL = 1e-4


class Triplets(NamedTuple):
    left: Tensor  # [L, m, k] orthonormal columns on the long side, in the dtype asked for
    s: Tensor  # [L, k] descending
    right: Tensor  # [L, n, k]
    residual: Tensor  # [L] of these very tensors


def floor_of(dtype: torch.dtype) -> float:
    """Part of s_1 below which a residual is measured against that part, not against s_i."""
    return 2.0**-26 if dtype == torch.float64 else 2.0**-8


def chunk_size(shape: tuple[int, ...], k: int, dtype: torch.dtype, workspace: int) -> int:
    """Matrices worked on at once so that the float64 copies below stay within `workspace` bytes."""
    m, n = max(shape), min(shape)
    return max(1, workspace // (8 * (2 * m * n + 3 * n * n + 4 * (m + n) * k)))


def factorize(w: Tensor, k: int) -> Triplets:
    """The k leading triplets by eigenvectors of W^T W, accumulated in float64."""
    wide = w.double()
    _, vectors = torch.linalg.eigh(wide.mT @ wide)
    return finish(wide, vectors[..., -k:].flip(-1), w.dtype)


def finish(w: Tensor, right: Tensor, dtype: torch.dtype) -> Triplets:
    """Triplets in `dtype` from right vectors that diagonalise V^T W^T W V: u_i = W v_i / s_i.

    `w [L, m, n]` and `right [L, n, k]` are float64.
    """
    image = w @ right  # [L, m, k]
    s = torch.linalg.vector_norm(image, dim=-2)  # [L, k]
    s, order = s.sort(dim=-1, descending=True, stable=True)
    right = right.gather(-1, order[:, None, :].expand_as(right))
    image = image.gather(-1, order[:, None, :].expand_as(image))
    small = s <= _SMALL * s[:, :1]
    left = image / torch.where(small, torch.ones_like(s), s)[:, None, :]
    for i in small.any(dim=-1).nonzero()[:, 0].tolist():
        kept = int((~small[i]).sum())
        left[i], s[i], right[i] = _complete(w[i], left[i], s[i], right[i], kept)
    left, s, right = left.to(dtype), s.to(dtype), right.to(dtype)
    return Triplets(left, s, right, residual(w, left, s, right))


def _complete(
    w: Tensor, left: Tensor, s: Tensor, right: Tensor, kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the triplets after the first `kept` by those of W on the remaining directions.

    The Q factor of [u_1 .. u_kept, W v_kept+1 ..] is orthonormal whatever the rank of its argument,
    so vanishing singular values get left vectors too.
    """
    q = torch.linalg.qr(left)[0][:, kept:]  # [m, r]
    rest = right[:, kept:]  # [n, r]
    a, values, bh = torch.linalg.svd(q.mT @ (w @ rest))
    return (
        torch.cat([left[:, :kept], q @ a], dim=1),
        torch.cat([s[:kept], values]),
        torch.cat([right[:, :kept], rest @ bh.mT], dim=1),
    )


def residual(w: Tensor, left: Tensor, s: Tensor, right: Tensor) -> Tensor:  # [L]
    """max_i of |W v_i - s_i u_i| and |W^T u_i - s_i v_i|, over max(s_i, floor s_1).

    Computed in the dtype of `w`; the floor is that of the factors' dtype. 0 for a zero matrix.
    """
    floor = floor_of(s.dtype)
    left, s, right = left.to(w.dtype), s.to(w.dtype), right.to(w.dtype)
    forward = torch.linalg.vector_norm(w @ right - left * s[:, None, :], dim=-2)
    backward = torch.linalg.vector_norm(w.mT @ left - right * s[:, None, :], dim=-2)
    scale = torch.maximum(s, floor * s[:, :1])
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (torch.maximum(forward, backward) / scale).amax(dim=-1)
