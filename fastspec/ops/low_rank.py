"""A layer with a low-rank core: its update as two thin factors, and the operator that adds them.

    y = x W^T + b + (x R^T) L^T      L = 2 U A^T [out, r],  R = (B0 + B) Vh [r, in]

L and R are made once a call, by products with U and Vh that do not grow with the rows of x. The projection
x Vh^T of the other cores is never made: t = x R^T has r columns. With s = g L the backward is

    dA = 2 (t^T g) U,    dB = (s^T x) Vh^T,    dx = g W + s R

which needs x, as LoRA's does. With a core for every row of a batch all of it has a leading dimension [B].

A grows from zero. So in float16 the operator makes L and s of A over a power of two for each of its r rows,
which is near its largest entry (`scale`), and multiplies by that where nothing can fall below the range.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastspec.cores import LOW_RANK_SCALE, low_rank_parts
from fastspec.ops import aten

_BASIS = "Tensor u, Tensor vh"
torch.library.define(
    "fastspec::low_rank_linear",
    f"(Tensor x, Tensor? weight, Tensor? bias, {_BASIS}, Tensor delta, str forward, bool trains)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "fastspec::low_rank_linear_backward",
    f"(Tensor g, Tensor? x, Tensor? t, Tensor? weight, {_BASIS}, Tensor left, Tensor right, Tensor scale,"
    " str forward, bool needs_dx, bool needs_delta) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def update_factors(u: Tensor, vh: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """L [out, r] and R [r, in] with U C Vh = L R, in the dtype of u; differentiable in delta.

    Args:
        u, vh: [out, k] and [k, in].
        delta: storage of a low-rank core [2r, k], or of several [B, 2r, k]: then L is [B, out, r] and R
            [B, r, in].
    """
    return _scaled_factors(u, vh, delta, scaled=False)[:2]


def _scaled_factors(
    u: Tensor, vh: Tensor, delta: Tensor, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """L over `scale` [..., r], R, and `scale`, which is empty where there is none."""
    left, right = low_rank_parts(delta.to(aten.accumulation_dtype(u, delta)))
    scale = left.new_empty(0)
    if scaled:
        scale = torch.ldexp(torch.ones_like(left[..., 0]), torch.frexp(left.abs().amax(-1))[1])
        left = left / scale[..., None]
    return u @ left.to(u.dtype).mT, right.to(vh.dtype) @ vh, scale


def _scaled(t: Tensor, scale: Tensor) -> Tensor:
    """t [..., N, r] times scale [..., r], in the dtype of t."""
    return (t * scale[..., None, :]).to(t.dtype) if scale.numel() else t


def _rows(x: Tensor, left: Tensor) -> Tensor:
    """x as [N, columns], or [B, N, columns] where every entry of dimension 0 has its own `left`."""
    if left.dim() == 2:
        return x.reshape(-1, x.shape[-1])
    return x.reshape(len(left), math.prod(x.shape[1:-1]), x.shape[-1])


def _effective(
    weight: Tensor, left: Tensor, right: Tensor, scale: Tensor, forward: str, like: Tensor
) -> Tensor:
    """The matrix of the large product, in the dtype of `like`: W, or W + L R in scratch."""
    if forward == "merged":
        left, right = _scaled(left, scale).to(weight.dtype), right.to(weight.dtype)
        weight = aten.add_product(weight, left, right, aten.scratch.like(weight))
    return weight.to(like.dtype)


def _low_rank_linear(
    x: Tensor,  # [..., in]
    weight: Tensor | None,  # [out, in]; of forward="resident" W + L R; None: y is the update alone
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    delta: Tensor,  # [2r, k], or [B, 2r, k] for x [B, ..., in]
    forward: str,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [..., out], t = x R^T (no rows where nothing is trained), L over `scale`, R and `scale`."""
    dtype = x.dtype
    left, right, scale = _scaled_factors(u, vh, delta, scaled=dtype == torch.float16)
    none, rows = x.new_empty((0, right.shape[-2])), _rows(x, left)
    t = rows @ right.to(dtype).mT if trains or forward == "factored" else none
    saved = t if trains else none
    if forward != "factored":
        assert weight is not None
        y = F.linear(x, _effective(weight, left, right, scale, forward, x), bias)
        return y, saved, left, right, scale
    z, lt = _scaled(t, scale), left.to(dtype).mT
    if weight is None:
        y = z @ lt
    elif x.is_cpu or left.dim() == 3:
        # the product alone starts a layer, for a first step that is the pretrained model's, and a row
        # without a task that is the frozen layer's
        y = F.linear(x, weight.to(dtype), bias).view(*rows.shape[:-1], len(weight))
        y = y.addmm_(z, lt) if left.dim() == 2 else y.baddbmm_(z, lt)
    else:
        # the small correction is rounded on its way, not y
        y = z @ lt if bias is None else torch.addmm(bias, z, lt)
        y = y.addmm_(rows, weight.to(dtype).mT)
    return y.view(*x.shape[:-1], len(u)), saved, left, right, scale


def _low_rank_linear_backward(
    g: Tensor,  # [..., out]
    x: Tensor | None,  # [..., in]
    t: Tensor | None,
    weight: Tensor | None,
    u: Tensor,
    vh: Tensor,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    forward: str,
    needs_dx: bool,
    needs_delta: bool,
) -> tuple[Tensor, Tensor]:
    """dx [..., in] and d delta in float32 at least; what is not needed comes back empty."""
    dtype, rows = g.dtype, _rows(g, left)
    dx, ddelta = g.new_empty(0), g.new_empty(0, dtype=aten.accumulation_dtype(u))
    s = rows @ left.to(dtype) if needs_delta or forward == "factored" else None  # over `scale`
    if needs_dx:
        if s is None or forward != "factored":
            assert weight is not None
            dx2 = rows @ _effective(weight, left, right, scale, forward, g)
        elif weight is None:
            dx2 = _scaled(s, scale) @ right.to(dtype)
        else:
            z, r = _scaled(s, scale), right.to(dtype)
            dx2 = rows @ weight.to(dtype)
            dx2 = dx2.addmm_(z, r) if left.dim() == 2 else dx2.baddbmm_(z, r)
        dx = dx2.view(*g.shape[:-1], vh.shape[1])
    if needs_delta:
        assert x is not None
        assert t is not None
        assert s is not None
        da = (t.mT @ rows).to(u.dtype) @ u
        db = ((s.mT @ _rows(x, left)).to(vh.dtype) @ vh.mT).to(ddelta.dtype)
        db = db * scale[..., None] if scale.numel() else db
        ddelta = torch.cat([LOW_RANK_SCALE * da.to(ddelta.dtype), db], -2)
    return dx, ddelta


torch.library.impl("fastspec::low_rank_linear", "CompositeExplicitAutograd", _low_rank_linear)
torch.library.impl(
    "fastspec::low_rank_linear_backward", "CompositeExplicitAutograd", _low_rank_linear_backward
)
_forward_op = torch.ops.fastspec.low_rank_linear.default
_backward_op = torch.ops.fastspec.low_rank_linear_backward.default


@torch.library.register_fake("fastspec::low_rank_linear")
def _(x, weight, bias, u, vh, delta, forward, trains):
    torch._check(x.shape[-1] == vh.shape[1])
    several, r = delta.shape[:-2], delta.shape[-2] // 2
    left, right = u.new_empty((*several, len(u), r)), vh.new_empty((*several, r, vh.shape[1]))
    wide = aten.accumulation_dtype(u, delta)
    scale = delta.new_empty((*several, r) if x.dtype == torch.float16 else (0,), dtype=wide)
    y = x.new_empty((*x.shape[:-1], len(u)))
    t = x.new_empty((*_rows(x, left).shape[:-1], r) if trains else (0, r))
    return y, t, left, right, scale


@torch.library.register_fake("fastspec::low_rank_linear_backward")
def _(g, x, t, weight, u, vh, left, right, scale, forward, needs_dx, needs_delta):
    dx = g.new_empty((*g.shape[:-1], vh.shape[1]) if needs_dx else (0,))
    shape = (*left.shape[:-2], 2 * left.shape[-1], vh.shape[0])
    wide = aten.accumulation_dtype(u)
    return dx, g.new_empty(shape if needs_delta else (0,), dtype=wide)


def _differentiable_backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    u: Tensor,
    vh: Tensor,
    delta: Tensor,
    forward: str,
) -> tuple[Tensor, Tensor | None]:
    """The backward by formulas that autograd follows, for a backward that is differentiated itself."""
    dtype = g.dtype
    left, right = (f.to(dtype) for f in update_factors(u, vh, delta))
    rows = _rows(g, left)
    s = rows @ left
    dx = s @ right
    if forward == "resident":  # W holds L R already, as a constant: its derivative alone is added
        dx = dx - rows @ left.detach() @ right.detach()
    if weight is not None:
        dx = dx + rows @ weight.to(dtype)
    dx = dx.view(*g.shape[:-1], vh.shape[1])
    if x is None:
        return dx, None
    x = _rows(x, left)
    da = (x @ right.mT).mT @ rows @ u.to(dtype)
    return dx, torch.cat([LOW_RANK_SCALE * da, s.mT @ x @ vh.to(dtype).mT], -2)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, u, vh, delta, forward, trains = inputs
    _, t, left, right, scale = output
    ctx.forward_plan = forward
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(t, left, right, scale)
    thin = (x, t) if trains else (None, None)
    ctx.save_for_backward(*thin, weight, u, vh, delta, left, right, scale)


def _backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs_dx, _w, needs_bias, _u, _v, needs_delta, *_rest = ctx.needs_input_grad
    dx = dbias = ddelta = None
    if g is not None:
        x, t, weight, u, vh, delta, left, right, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, ddelta = _differentiable_backward(g, x, weight, u, vh, delta, ctx.forward_plan)
        elif needs_dx or needs_delta:
            needs = (ctx.forward_plan, needs_dx, needs_delta)
            dx, ddelta = _backward_op(g, x, t, weight, u, vh, left, right, scale, *needs)
        if needs_bias:
            dbias = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
        ddelta = ddelta.to(delta.dtype) if needs_delta and ddelta is not None else None
    return dx if needs_dx else None, None, dbias, None, None, ddelta, None, None


torch.library.register_autograd(
    "fastspec::low_rank_linear", _backward, setup_context=_setup_context
)


def low_rank_linear(
    x: Tensor,  # [..., in]
    weight: Tensor | None,  # [out, in]; None: the update alone, of forward="factored"
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    delta: Tensor,  # [2r, k]
    forward: str,
    trains: bool,
) -> Tensor:  # [..., out]
    """The layer; `trains`: delta wants a gradient. Arguments are taken as valid: `functional` checks."""
    if forward == "resident" and not trains:
        assert weight is not None
        return F.linear(x, weight.to(x.dtype), bias)  # holds all of it
    return _forward_op(x, weight, bias, u, vh, delta, forward, trains)[0]


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

    A negative task leaves its row as the frozen layer computes it: A is zero there.
    """
    index = task.clamp_min(0)
    # each device's way to add rows of one task in a fixed order, in the backward
    deltas = table.index_select(0, index) if table.is_cpu else table[index]
    deltas = torch.where((task >= 0)[:, None, None], deltas, 0)
    trains = deltas.requires_grad and torch.is_grad_enabled()
    return _forward_op(x, weight, bias, u, vh, deltas, "factored", trains)[0]
