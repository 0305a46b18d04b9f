"""The operator `fastspec::task_linear` and its backward: many tasks in one batch (design section 5).

    y = x W^T + b + core(x Vh^T) U^T      the core of row b of the batch is table[task[b]]

One gather, no loop over tasks. A negative task leaves its row as the frozen layer computes it, bit for bit:
the correction that is added there is zero. The frozen product is there in any case, so on the short side
(F3) the projections come from it with the layer's own S, whatever the tasks:
p = (x W^T) U / S where out < in, and q = (g W) V / S where in < out.

On a CPU csrc/task_linear.cpp computes the same and takes precedence where it is built.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastspec.cores import diagonals
from fastspec.ops import compiled, cuda
from fastspec.ops.aten import SIGMA_FLOOR, accumulation_dtype, drowned

_OPERANDS = "Tensor u, Tensor s, Tensor vh, Tensor table, Tensor task, str core"

torch.library.define(
    "fastspec::task_linear",
    f"(Tensor x, Tensor weight, Tensor? bias, {_OPERANDS}, bool short, bool saves_p) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name in ("task_linear_backward", "task_linear_double"):  # the latter for a second backward
    torch.library.define(
        f"fastspec::{_name}",
        f"(Tensor g, Tensor? p, Tensor weight, {_OPERANDS}, bool short, bool needs_dx, bool needs_table)"
        " -> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def _task_linear(
    x: Tensor,  # [B, ..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    s: Tensor,  # [k]
    vh: Tensor,  # [k, in]
    table: Tensor,  # [tasks, the core's storage]
    task: Tensor,  # [B]
    core: str,
    short: bool,
    saves_p: bool,
) -> tuple[Tensor, Tensor]:
    """y [B, ..., out] and p [N, k] (no rows where it is not saved)."""
    out_features, in_features = weight.shape
    dtype = x.dtype
    y = F.linear(x, weight.to(dtype), bias)
    y2 = y.view(-1, out_features)
    p = None
    if short and out_features < in_features and _is_invertible(s):
        basis = u / s.to(dtype)
        p = y2 @ basis
        if bias is not None:
            p -= bias @ basis
    if p is None or (bias is not None and drowned(p, u, s, bias)):
        p = x.reshape(-1, in_features) @ vh.to(dtype).mT
    y2.addmm_(_apply_cores(p, table, task, core, transpose=True), u.to(dtype).mT)
    return y, p if saves_p else x.new_empty((0, u.shape[1]))


def _task_linear_backward(
    g: Tensor,  # [B, ..., out]
    p: Tensor | None,  # [N, k]
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    table: Tensor,
    task: Tensor,
    core: str,
    short: bool,
    needs_dx: bool,
    needs_table: bool,
) -> tuple[Tensor, Tensor]:
    """dx [B, ..., in] and d table in the table's shape; what is not needed comes back empty."""
    out_features, in_features = weight.shape
    dtype = g.dtype
    g2 = g.reshape(-1, out_features)
    dx2 = g2 @ weight.to(dtype) if needs_dx else None
    if dx2 is not None and short and in_features < out_features and _is_invertible(s):
        q = dx2 @ (vh.mT / s.to(dtype))
    else:
        q = g2 @ u.to(dtype)
    if dx2 is not None:
        dx2.addmm_(_apply_cores(q, table, task, core), vh.to(dtype))
    dx = g.new_empty(0) if dx2 is None else dx2.view(*g.shape[:-1], in_features)
    if not needs_table:
        return dx, table.new_empty(0)
    assert p is not None
    return dx, _reduce_cores(q, p, table, task, core)


@torch.library.impl("fastspec::task_linear_double", "CompositeImplicitAutograd")
def _differentiable_backward(
    g: Tensor,  # [B, ..., out]
    p: Tensor | None,  # [N, k], with the graph that leads to x
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    table: Tensor,
    task: Tensor,
    core: str,
    short: bool,
    needs_dx: bool,
    needs_table: bool,
) -> tuple[Tensor, Tensor]:
    """The backward by formulas that autograd follows, for a backward that is differentiated itself."""
    dtype = g.dtype
    g2 = g.reshape(-1, g.shape[-1])
    u, vh = u.to(dtype), vh.to(dtype)
    q = g2 @ u
    dx, dtable = g.new_empty(0), table.new_empty(0)
    if needs_dx:
        dx2 = g2 @ weight.to(dtype) + _apply_cores(q, table, task, core) @ vh
        dx = dx2.view(*g.shape[:-1], vh.shape[1])
    if needs_table:
        assert p is not None
        dtable = _reduce_cores(q, p, table, task, core)
    return dx, dtable


torch.library.impl("fastspec::task_linear", "CompositeExplicitAutograd", _task_linear)
torch.library.impl(
    "fastspec::task_linear_backward", "CompositeExplicitAutograd", _task_linear_backward
)
compiled.load()  # csrc/task_linear.cpp
cuda.register("task_linear", _task_linear)
cuda.register("task_linear_backward", _task_linear_backward)


def _is_invertible(s: Tensor) -> bool:
    """Whether no direction's rounding error is amplified beyond 1 / SIGMA_FLOOR by dividing by S."""
    low, high = torch.aminmax(s)
    return bool(low > SIGMA_FLOOR * high)


def _cores(table: Tensor, task: Tensor, dtype: torch.dtype) -> Tensor:
    """The core's storage of every row of the batch [B, ...]; zero where the row names no task."""
    rows = table.index_select(0, task.clamp_min(0)).to(dtype)
    named = (task >= 0).view(-1, *(1,) * (rows.dim() - 1))
    return torch.where(named, rows, 0)


def _apply_cores(
    t: Tensor, table: Tensor, task: Tensor, core: str, *, transpose: bool = False
) -> Tensor:
    """t C, or t C^T  [N, k], every row with its own core; the arithmetic is in float32 at least."""
    n, k = t.shape
    if n == 0:
        return t
    wide = accumulation_dtype(t, table)
    c = _cores(table, task, wide)
    blocks = t.view(len(task), -1, k)
    if core == "diag":
        out = blocks.to(wide) * c[:, None]
    elif core == "dense":
        out = torch.bmm(blocks.to(wide), c.mT if transpose else c)
    else:
        out = torch.zeros_like(blocks, dtype=wide)
        for d, i, j in diagonals(c.shape[1], k):
            source, target = (j, i) if transpose else (i, j)
            out[..., target] += blocks[..., source] * c[:, None, d, i]
    return out.view(n, k).to(t.dtype)


def _reduce_cores(q: Tensor, p: Tensor, table: Tensor, task: Tensor, core: str) -> Tensor:
    """The trained entries of q^T p of every task's rows, in the table's shape and dtype."""
    k, wide = q.shape[1], accumulation_dtype(table)
    grad = torch.zeros_like(table)
    if len(q) == 0:
        return grad
    q, p = (t.to(wide).view(len(task), -1, k) for t in (q, p))
    if core == "diag":
        shares = (q * p).sum(1)
    elif core == "dense":
        shares = torch.bmm(q.mT, p)
    else:
        shares = q.new_zeros(len(task), *table.shape[1:])
        for d, i, j in diagonals(table.shape[1], k):
            shares[:, d, i] = (q[..., i] * p[..., j]).sum(1)
    named = (task >= 0).view(-1, *(1,) * (shares.dim() - 1))
    index, shares = task.clamp_min(0), torch.where(named, shares, 0).to(table.dtype)
    # each device's way to add rows of one task in a fixed order
    if grad.device.type == "cpu":
        return grad.index_add_(0, index, shares)
    return grad.index_put_((index,), shares, accumulate=True)


@torch.library.register_fake("fastspec::task_linear")
def _(x, weight, bias, u, s, vh, table, task, core, short, saves_p):
    torch._check(x.shape[-1] == vh.shape[1])
    y = x.new_empty((*x.shape[:-1], u.shape[0]))
    return y, x.new_empty((math.prod(x.shape[:-1]) if saves_p else 0, u.shape[1]))


@torch.library.register_fake("fastspec::task_linear_backward")
def _(g, p, weight, u, s, vh, table, task, core, short, needs_dx, needs_table):
    dx = g.new_empty((*g.shape[:-1], vh.shape[1]) if needs_dx else (0,))
    return dx, table.new_empty(table.shape if needs_table else (0,))


_forward_op = torch.ops.fastspec.task_linear.default
_backward_op = torch.ops.fastspec.task_linear_backward.default
_double_op = torch.ops.fastspec.task_linear_double.default


def task_linear(
    x: Tensor,  # [B, ..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    s: Tensor,  # [k]
    vh: Tensor,  # [k, in]
    table: Tensor,  # [tasks, the core's storage]
    task: Tensor,  # [B]
    core: str,
    short: bool,
    saves_p: bool,
) -> Tensor:  # [B, ..., out]
    """The operator, its saved projection dropped. Arguments are taken as valid: `functional` checks."""
    return _forward_op(x, weight, bias, u, s, vh, table, task, core, short, saves_p)[0]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, u, s, vh, table, task, core, short, saves_p = inputs
    ctx.how = (core, short)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    ctx.x_shape = x.shape
    if not saves_p:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1] if saves_p else None, weight, u, s, vh, table, task)


def _backward(ctx: Any, g: Tensor | None, dp: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_dx, _, needs_bias, _, _, _, needs_table, *_rest = ctx.needs_input_grad
    dx = dbias = dtable = None
    if g is not None:
        if needs_dx or needs_table:
            backward = _double_op if torch.is_grad_enabled() else _backward_op
            dx, dtable = backward(g, *ctx.saved_tensors, *ctx.how, needs_dx, needs_table)
        if needs_bias:
            dbias = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
    if needs_dx and dp is not None:  # in a second backward, through p = x Vh^T
        through_p = (dp @ ctx.saved_tensors[4].to(dp.dtype)).view(ctx.x_shape)
        dx = through_p if dx is None else dx + through_p
    return (
        dx if needs_dx else None,
        None,
        dbias,
        *(None,) * 3,
        dtable if needs_table else None,
        *(None,) * 4,
    )


torch.library.register_autograd("fastspec::task_linear", _backward, setup_context=_setup_context)
