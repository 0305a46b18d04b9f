"""A layer with a low-rank core: its update as two thin factors, and the operator that adds them.

    y = x W^T + b + (x R^T) L^T      L = 2 U A^T [out, r],  R = (B0 + B) Vh [r, in]

L and R are made once a call, by products with U and Vh that do not grow with the rows of x. The projection
x Vh^T of the other cores is never made: t = x R^T has r columns. The backward needs x for dR = (g L)^T x,
as LoRA's does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastspec.cores import low_rank_parts
from fastspec.ops import aten

_FACTORS = "Tensor left, Tensor right, str forward"
torch.library.define(
    "fastspec::low_rank_linear",
    f"(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, bool saves_t) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "fastspec::low_rank_linear_backward",
    f"(Tensor g, Tensor? x, Tensor? t, Tensor weight, {_FACTORS}, bool needs_dx, bool needs_factors)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def update_factors(u: Tensor, vh: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """L [out, r] and R [r, in] with U C Vh = L R, in the dtype of u; differentiable in delta.

    Args:
        u, vh: [out, k] and [k, in].
        delta: storage of a low-rank core [2r, k], or of several [B, 2r, k]: then L is [B, out, r] and R
            [B, r, in].
    """
    left, right = low_rank_parts(delta.to(aten.accumulation_dtype(u, delta)))
    return u @ left.to(u.dtype).mT, right.to(vh.dtype) @ vh


def _effective(weight: Tensor, left: Tensor, right: Tensor, forward: str, like: Tensor) -> Tensor:
    """The matrix of the large product, in the dtype of `like`: W, or W + L R in scratch."""
    if forward == "merged":
        left, right = left.to(weight.dtype), right.to(weight.dtype)
        weight = aten.add_product(weight, left, right, aten.scratch.like(weight))
    return weight.to(like.dtype)


def _low_rank_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]; of forward="resident" W + L R
    bias: Tensor | None,  # [out]
    left: Tensor,  # [out, r]
    right: Tensor,  # [r, in]
    forward: str,
    saves_t: bool,
) -> tuple[Tensor, Tensor]:
    """y [..., out] and t = x R^T [N, r] (no rows where it is not saved)."""
    dtype, x2 = x.dtype, x.reshape(-1, x.shape[-1])
    none = x.new_empty((0, len(right)))
    t = x2 @ right.to(dtype).mT if saves_t or forward == "factored" else none
    saved = t if saves_t else none
    if forward != "factored":
        return F.linear(x, _effective(weight, left, right, forward, x), bias), saved
    lt, w = left.to(dtype).mT, weight.to(dtype)
    if (
        x.is_cpu
    ):  # the product alone starts a layer, for a first step that is the pretrained model's
        y = F.linear(x, w, bias)
        y.view(-1, len(weight)).addmm_(t, lt)
        return y, saved
    # the small correction is rounded on its way, not y
    y2 = t @ lt if bias is None else torch.addmm(bias, t, lt)
    return y2.addmm_(x2, w.mT).view(*x.shape[:-1], len(weight)), saved


def _low_rank_linear_backward(
    g: Tensor,  # [..., out]
    x: Tensor | None,  # [..., in]
    t: Tensor | None,  # [N, r]
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    forward: str,
    needs_dx: bool,
    needs_factors: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., in], dL [out, r] and dR [r, in]; what is not needed comes back empty."""
    dtype, g2, in_features = g.dtype, g.reshape(-1, g.shape[-1]), weight.shape[1]
    dx, dleft, dright = g.new_empty(0), left.new_empty(0), right.new_empty(0)
    s = g2 @ left.to(dtype) if needs_factors or forward == "factored" else None
    if needs_dx:
        dx2 = g2 @ _effective(weight, left, right, forward, g)
        if s is not None and forward == "factored":
            dx2.addmm_(s, right.to(dtype))
        dx = dx2.view(*g.shape[:-1], in_features)
    if needs_factors:
        assert x is not None
        assert t is not None
        assert s is not None
        dleft = (g2.mT @ t).to(left.dtype)
        dright = (s.mT @ x.reshape(-1, in_features)).to(right.dtype)
    return dx, dleft, dright


torch.library.impl("fastspec::low_rank_linear", "CompositeExplicitAutograd", _low_rank_linear)
torch.library.impl(
    "fastspec::low_rank_linear_backward", "CompositeExplicitAutograd", _low_rank_linear_backward
)
_forward_op = torch.ops.fastspec.low_rank_linear.default
_backward_op = torch.ops.fastspec.low_rank_linear_backward.default


@torch.library.register_fake("fastspec::low_rank_linear")
def _(x, weight, bias, left, right, forward, saves_t):
    torch._check(x.shape[-1] == right.shape[1])
    y = x.new_empty((*x.shape[:-1], left.shape[0]))
    return y, x.new_empty((math.prod(x.shape[:-1]) if saves_t else 0, left.shape[1]))


@torch.library.register_fake("fastspec::low_rank_linear_backward")
def _(g, x, t, weight, left, right, forward, needs_dx, needs_factors):
    dx = g.new_empty((*g.shape[:-1], weight.shape[1]) if needs_dx else (0,))
    shapes = (left.shape, right.shape) if needs_factors else ((0,), (0,))
    return dx, left.new_empty(shapes[0]), right.new_empty(shapes[1])


def _differentiable_backward(
    g: Tensor, x: Tensor | None, weight: Tensor, left: Tensor, right: Tensor, forward: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backward by formulas that autograd follows, for a backward that is differentiated itself."""
    dtype, g2 = g.dtype, g.reshape(-1, g.shape[-1])
    left, right = left.to(dtype), right.to(dtype)
    update = left @ right
    if forward == "resident":  # it holds L R already, as a constant: its derivative alone is added
        update = update - update.detach()
    dx = (g2 @ (weight.to(dtype) + update)).view(*g.shape[:-1], weight.shape[1])
    if x is None:
        return dx, None, None
    x2 = x.reshape(-1, x.shape[-1])
    return dx, g2.mT @ (x2 @ right.mT), (g2 @ left).mT @ x2


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, left, right, forward, saves_t = inputs
    ctx.forward_plan = forward
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    thin = (x, output[1]) if saves_t else (None, None)
    ctx.save_for_backward(*thin, weight, left, right)


def _backward(ctx: Any, g: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    needs_dx, _weight, needs_bias, needs_left, needs_right, *_rest = ctx.needs_input_grad
    dx = dbias = dleft = dright = None
    if g is not None:
        x, t, weight, left, right = ctx.saved_tensors
        operands = (weight, left, right, ctx.forward_plan)
        trains = needs_left or needs_right
        if torch.is_grad_enabled():
            dx, dleft, dright = _differentiable_backward(g, x, *operands)
        elif needs_dx or trains:
            dx, dleft, dright = _backward_op(g, x, t, *operands, needs_dx, trains)
        if needs_bias:
            dbias = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
    return (
        dx if needs_dx else None,
        None,
        dbias,
        dleft if needs_left else None,
        dright if needs_right else None,
        None,
        None,
    )


torch.library.register_autograd(
    "fastspec::low_rank_linear", _backward, setup_context=_setup_context
)


def low_rank_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    delta: Tensor,  # [2r, k]
    forward: str,
    trains: bool,
) -> Tensor:  # [..., out]
    """The layer; `trains`: delta wants a gradient. Arguments are taken as valid: `functional` checks."""
    if forward == "resident" and not trains:
        return F.linear(x, weight.to(x.dtype), bias)  # holds all of it
    return _forward_op(x, weight, bias, *update_factors(u, vh, delta), forward, trains)[0]


def low_rank_task_linear(
    x: Tensor,  # [B, ..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    table: Tensor,  # [tasks, 2r, k]
    task: Tensor,  # [B]
) -> Tensor:  # [B, ..., out]
    """The layer with every row's own task: L and R of each row of the batch, by two products for all.

    A negative task leaves its row as the frozen layer computes it: L is zero there.
    """
    dtype, index = x.dtype, task.clamp_min(0)
    # each device's way to add rows of one task in a fixed order, in the backward
    deltas = table.index_select(0, index) if table.is_cpu else table[index]
    deltas = torch.where((task >= 0)[:, None, None], deltas, 0)
    left, right = update_factors(u.to(dtype), vh.to(dtype), deltas)
    y = F.linear(x, weight.to(dtype), bias)
    rows = (len(task), math.prod(x.shape[1:-1]))
    t = x.reshape(*rows, -1) @ right.mT if x.numel() else x.new_zeros(*rows, right.shape[1])
    return torch.baddbmm(y.view(*rows, len(weight)), t, left.mT).view(y.shape)
