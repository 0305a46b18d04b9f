"""The formulas of the method, written to be read. Every other path is judged against these.

Alphabet: x [..., in], weight W [out, in], u [out, k], vh [k, in], p = x Vh^T and q = g U [N, k],
C the k x k core, `delta` its trainable storage (`fastspec.cores` says how, and where each is from).

Plain torch, any floating dtype, differentiable in every argument; float64 passes `gradcheck`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastspec.cores import core_gradient, core_matrix


def effective_weight(
    weight: Tensor, u: Tensor, vh: Tensor, delta: Tensor, core: str = "diag"
) -> Tensor:
    """W_eff = W + U C Vh  [out, in]  (design section 1)."""
    wide = torch.promote_types(delta.dtype, weight.dtype)
    c = core_matrix(delta.to(wide), core).to(weight.dtype)
    return weight + u @ c @ vh


def spectral_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    delta: Tensor,
    core: str = "diag",
) -> Tensor:  # [..., out]
    """y = x W_eff^T + b, differentiable by autograd."""
    return F.linear(x, effective_weight(weight, u, vh, delta, core), bias)


def spectral_linear_backward(
    g: Tensor,  # [N, out], dL/dy
    x: Tensor,  # [N, in]
    weight: Tensor,
    u: Tensor,
    vh: Tensor,
    delta: Tensor,
    core: str = "diag",
) -> tuple[Tensor, Tensor]:
    """(dx, d delta) by the explicit formulas:  dx = g W_eff,  dC = q^T p  with p = x Vh^T, q = g U."""
    dx = g @ effective_weight(weight, u, vh, delta, core)
    p = x @ vh.mT
    q = g @ u
    return dx, core_gradient(q.mT @ p, delta, core)


def task_linear(
    x: Tensor,  # [B, ..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    table: Tensor,  # [tasks, ...], each entry a delta
    task: Tensor,  # [B]
    core: str = "diag",
) -> Tensor:  # [B, ..., out]
    """Row b is `spectral_linear` with table[task[b]], or the frozen layer where task[b] < 0."""
    # of the whole batch: a product of fewer rows may round otherwise
    frozen = F.linear(x, weight, bias)
    rows = [
        plain if t < 0 else spectral_linear(row, weight, bias, u, vh, table[t], core)
        for row, plain, t in zip(x, frozen, map(int, task), strict=True)
    ]
    return torch.stack(rows) if rows else frozen
