"""Singular triplets from a subspace, and the subspace from the Gram matrix (design section 4).

Every function works on a stack `w [L, m, n]` with m >= n: the short side is last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastspec.svd.options import Options


class Triplets(NamedTuple):
    left: Tensor  # [L, m, k] orthonormal columns on the long side, in the dtype asked for
    s: Tensor  # [L, k] descending
    right: Tensor  # [L, n, k]
    residual: Tensor  # [L] of these very tensors


def chunk_size(shape: tuple[int, ...], k: int, dtype: torch.dtype, workspace: int) -> int:
    """Matrices worked on at once so that the float64 copies below stay within `workspace` bytes."""
    m, n = max(shape), min(shape)
    return max(1, workspace // (8 * (2 * m * n + 3 * n * n + 4 * (m + n) * k)))


def gram_triplets(w: Tensor, options: Options) -> Triplets:
    """The k leading triplets by eigenvectors of W^T W, accumulated in float64."""
    right = gram_subspace(w, options.k)
    wide = w.double()
    return _triplets(wide, right, wide @ right, options, w.dtype)


def exact_triplets(w: Tensor, options: Options, dtype: torch.dtype) -> Triplets:
    """The k leading triplets by LAPACK's SVD of W itself."""
    k = options.k
    left, s, rows = torch.linalg.svd(w, full_matrices=False)
    left, s, right = left[..., :k].to(dtype), s[:, :k].to(dtype), rows[:, :k].mT.to(dtype)
    return Triplets(left, s, right, residual(w, left, s, right, options.floor))


def gram_subspace(w: Tensor, k: int) -> Tensor:  # [L, n, k] float64
    """Leading right vectors, by eigenvectors of W^T W."""
    wide = w.double()
    return torch.linalg.eigh(wide.mT @ wide)[1][..., -k:].flip(-1)


def rayleigh_ritz(w: Tensor, right: Tensor, options: Options, dtype: torch.dtype) -> Triplets:
    """The best triplets within the span of `right [L, n, k]`, whose columns are nearly orthonormal.

    The k x k problems are solved in float64, so that the left vectors stay orthogonal however far
    s_1 is above s_k; beyond `wide_ratio` times the products with W are float64 too.
    """
    image = w @ right
    s = torch.linalg.vector_norm(image, dim=-2)
    wide = w
    graded = options.wide_ratio * s.amin(dim=-1) < s.amax(dim=-1)
    if w.dtype == torch.float32 and bool(graded.any()):
        wide, right = w.double(), right.double()
        image = wide @ right
    # V <- V C with C^T (V^T V) C = 1 and C^T (V^T W^T W V) C diagonal
    metric = torch.linalg.cholesky(right.double().mT @ right.double())
    energy = image.double().mT @ image.double()
    half = torch.linalg.solve_triangular(metric, energy, upper=False)
    _, c = torch.linalg.eigh(torch.linalg.solve_triangular(metric, half.mT, upper=False))
    c = torch.linalg.solve_triangular(metric.mT, c.flip(-1), upper=True)
    if wide is w:
        c = c.to(w.dtype)
    return _triplets(wide, right @ c, image @ c, options, dtype)


def _triplets(
    w: Tensor, right: Tensor, image: Tensor, options: Options, dtype: torch.dtype
) -> Triplets:
    """u_i = W v_i / s_i from `image = W V` with orthogonal columns."""
    s = torch.linalg.vector_norm(image, dim=-2)  # [L, k]
    s, right, image = _descending(s, right, image)
    small = s <= options.small * s[:, :1]
    left = image / torch.where(small, torch.ones_like(s), s)[:, None, :]
    for i in small.any(dim=-1).nonzero()[:, 0].tolist():
        kept = int((~small[i]).sum())
        completed = _complete(
            w[i].double(), left[i].double(), s[i].double(), right[i].double(), kept
        )
        left[i], s[i], right[i] = (t.to(w.dtype) for t in completed)
    s, left, right = _descending(s, left, right)
    left, s, right = left.to(dtype), s.to(dtype), right.to(dtype)
    return Triplets(left, s, right, residual(w, left, s, right, options.floor))


def _descending(s: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s [L, k] in descending order, the columns of `a` and `b` likewise: rounding may swap neighbours."""
    if not bool((s[:, 1:] > s[:, :-1]).any()):
        return s, a, b
    s, order = s.sort(dim=-1, descending=True, stable=True)
    order = order[:, None, :]
    return s, a.gather(-1, order.expand_as(a)), b.gather(-1, order.expand_as(b))


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


def residual(w: Tensor, left: Tensor, s: Tensor, right: Tensor, floor: float) -> Tensor:  # [L]
    """max_i of |W v_i - s_i u_i| and |W^T u_i - s_i v_i|, over max(s_i, floor s_1).

    Computed in the dtype of `w`. 0 for a zero matrix.
    """
    left, s, right = left.to(w.dtype), s.to(w.dtype), right.to(w.dtype)
    forward = torch.linalg.vector_norm(w @ right - left * s[:, None, :], dim=-2)
    backward = torch.linalg.vector_norm(w.mT @ left - right * s[:, None, :], dim=-2)
    scale = torch.maximum(s, floor * s[:, :1])
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (torch.maximum(forward, backward) / scale).amax(dim=-1)
