"""The operators `fastspec::spectral_linear` and its backward: schema, fake kernel and autograd.

The backward is an operator of its own. What is saved for it is `p` [N, k] (F1), or `x` where the plan
takes the dense route (F4), and nothing where no coefficient gradient is wanted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastspec.ops import aten, compiled, cuda

_FACTORS = "Tensor u, Tensor s, Tensor vh, Tensor delta"
_PLAN = "str core, str forward, str gradient"

_FORWARD = f"(Tensor x, Tensor weight, Tensor? bias, {_FACTORS}, {_PLAN}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor g, Tensor? x, Tensor? p, Tensor weight, {_FACTORS}, {_PLAN}, bool needs_dx,"
    " bool needs_delta) -> (Tensor, Tensor)"
)
torch.library.define("fastspec::spectral_linear", _FORWARD, tags=(torch.Tag.pt2_compliant_tag,))
for _name in (
    "spectral_linear_backward",
    "spectral_linear_double",
):  # the latter for a second backward
    torch.library.define(f"fastspec::{_name}", _BACKWARD, tags=(torch.Tag.pt2_compliant_tag,))

torch.library.impl("fastspec::spectral_linear", "CompositeExplicitAutograd", aten.spectral_linear)
torch.library.impl(
    "fastspec::spectral_linear_backward", "CompositeExplicitAutograd", aten.spectral_linear_backward
)

compiled.load()  # csrc/spectral_linear.cpp
cuda.register("spectral_linear", aten.spectral_linear, _FORWARD)
cuda.register("spectral_linear_backward", aten.spectral_linear_backward, _BACKWARD)

_spectral_linear = torch.ops.fastspec.spectral_linear.default
_spectral_linear_backward = torch.ops.fastspec.spectral_linear_backward.default
_spectral_linear_double = torch.ops.fastspec.spectral_linear_double.default


def spectral_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    s: Tensor,  # [k]
    vh: Tensor,  # [k, in]
    delta: Tensor,  # the core's storage
    core: str,
    forward: str,
    gradient: str,
) -> Tensor:  # [..., out]
    """The operator, its saved projection dropped. Arguments are taken as valid: `functional` checks."""
    return _spectral_linear(x, weight, bias, u, s, vh, delta, core, forward, gradient)[0]


@torch.library.register_fake("fastspec::spectral_linear")
def _(x, weight, bias, u, s, vh, delta, core, forward, gradient):
    out_features, k = u.shape
    torch._check(x.shape[-1] == vh.shape[1])
    y = x.new_empty((*x.shape[:-1], out_features))
    saves_p = gradient in ("two_sided", "short")
    p = x.new_empty((math.prod(x.shape[:-1]) if saves_p else 0, k))
    return y, p


@torch.library.register_fake("fastspec::spectral_linear_backward")
def _(g, x, p, weight, u, s, vh, delta, core, forward, gradient, needs_dx, needs_delta):
    dx = g.new_empty((*g.shape[:-1], vh.shape[1]) if needs_dx else (0,))
    return dx, delta.new_empty(delta.shape if needs_delta else (0,))


@torch.library.impl("fastspec::spectral_linear_double", "CompositeImplicitAutograd")
def _differentiable_backward(
    g: Tensor,  # [..., out]
    x: Tensor | None,  # [..., in]
    p: Tensor | None,  # [N, k], with the graph that leads to x
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    delta: Tensor,
    core: str,
    forward: str,
    gradient: str,
    needs_dx: bool,
    needs_delta: bool,
) -> tuple[Tensor, Tensor]:
    """The backward by formulas that autograd follows, for a backward that is differentiated itself."""
    dtype = g.dtype
    g2 = g.reshape(-1, g.shape[-1])
    u, vh = u.to(dtype), vh.to(dtype)
    q = g2 @ u
    dx, ddelta = g.new_empty(0), delta.new_empty(0)
    if needs_dx:
        # a resident weight holds U C Vh already, as a constant: its derivative alone is added
        shift = delta - delta.detach() if forward == "resident" else delta
        dx2 = g2 @ weight.to(dtype) + aten.apply_core(q, shift, core) @ vh
        dx = dx2.view(*g.shape[:-1], vh.shape[1])
    if needs_delta:
        if p is None:
            assert x is not None
            p = x.reshape(-1, x.shape[-1]) @ vh.mT
        ddelta = aten.reduce_core(q, p, delta, core)
    return dx, ddelta


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, u, s, vh, delta, core, forward, gradient = inputs
    ctx.plan = (core, forward, gradient)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    ctx.x_shape = x.shape
    keeps_x = gradient == "dense" and ctx.needs_input_grad[6]
    keeps_p = gradient in ("two_sided", "short") and ctx.needs_input_grad[6]
    if not keeps_p:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(
        x if keeps_x else None, output[1] if keeps_p else None, weight, u, s, vh, delta
    )


def _backward(ctx: Any, g: Tensor | None, dp: Tensor | None) -> tuple[Tensor | None, ...]:
    needs_dx, _, needs_bias, _, _, _, needs_delta, *_rest = ctx.needs_input_grad
    dx = dbias = ddelta = None
    if g is not None:
        x, p, weight, u, s, vh, delta = ctx.saved_tensors
        if needs_dx or needs_delta:
            differentiated = torch.is_grad_enabled()
            backward = _spectral_linear_double if differentiated else _spectral_linear_backward
            dx, ddelta = backward(
                g, x, p, weight, u, s, vh, delta, *ctx.plan, needs_dx, needs_delta
            )
        if needs_bias:
            dbias = g.reshape(-1, g.shape[-1]).sum(0).to(ctx.bias_dtype)
    if needs_dx and dp is not None:  # in a second backward, through p = x Vh^T
        through_p = (dp @ ctx.saved_tensors[5].to(dp.dtype)).view(ctx.x_shape)
        dx = through_p if dx is None else dx + through_p
    return (
        dx if needs_dx else None,
        None,
        dbias,
        *(None,) * 3,
        ddelta if needs_delta else None,
        *(None,) * 3,
    )


torch.library.register_autograd(
    "fastspec::spectral_linear", _backward, setup_context=_setup_context
)
