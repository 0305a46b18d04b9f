"""What the tests of the operators share: a planned call, its exact results, what its backward computed."""

from __future__ import annotations

from typing import Any

import torch
from support import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastspec.ops import reference
from fastspec.ops.functional import spectral_linear


def run(p, core, plan, needs_dx=True, needs_delta=True):
    """(y, dx, d delta, d bias) by the planned operator."""
    x = p["x"].clone().requires_grad_(needs_dx)
    delta = p["delta"].clone().requires_grad_(needs_delta)
    bias = None if p["bias"] is None else p["bias"].clone().requires_grad_()
    y = spectral_linear(
        x, p["weight"], bias, p["u"], p["s"], p["vh"], delta,
        core=core, singular_basis=True, plan=plan,
    )  # fmt: skip
    y.backward(p["g"])
    return y.detach(), x.grad, delta.grad, None if bias is None else bias.grad


def exact(p, core):
    """(y, dx, d delta, d bias) in float64 by the explicit formulas; None for the gradient of no bias."""
    d = {n: None if t is None else t.double() for n, t in p.items()}
    y = reference.spectral_linear(d["x"], d["weight"], d["bias"], d["u"], d["vh"], d["delta"], core)
    dx, ddelta = reference.spectral_linear_backward(
        d["g"], d["x"], d["weight"], d["u"], d["vh"], d["delta"], core
    )
    return y, dx, ddelta, None if d["bias"] is None else d["g"].sum(0)


def check(got, want, dtype=None) -> None:
    """Results that are to be there are there and close, others are not there."""
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert_close(a, b, dtype)


def layer_call(p, plan=None):
    def call(x, delta):
        return spectral_linear(
            x, p["weight"], p["bias"], p["u"], p["s"], p["vh"], delta,
            singular_basis=True, plan=plan,
        )  # fmt: skip

    return call


class Backward(TorchDispatchMode):
    """Inside, the calls of a backward operator: what each was asked for, and how many numbers it returned."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = getattr(torch.ops.fastspec, operator).default
        self.needs: list[tuple[bool, bool]] = []
        self.computed: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out: Tensor | tuple[Tensor, ...] = op(*args, **(kwargs or {}))
        if op is self.operator:
            self.needs.append(args[-2:])
            self.computed.append(tuple(t.numel() for t in out))
        return out
