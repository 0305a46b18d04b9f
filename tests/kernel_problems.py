"""Operands for the kernel tests, and the exact results by `fastspec.ops.reference` in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastspec.ops import reference
from fastspec.precision import allows_tf32

CORES = ("diag", "task", "band", "dense")


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's permission to use TF32, which the kernels obey."""
    before = allows_tf32()
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def problem(
    n: int, d: int, out: int, k: int, core: str, dtype=torch.float32, seed=0, device="cpu"
) -> dict:
    """Random operands (any basis will do here), named as in the launchers."""
    gen = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64, device=device)

    shape = {"diag": (k,), "task": (5, k), "band": (3, k), "dense": (k, k)}[core]
    task = None
    if core == "task":
        task = torch.randint(0, 5, (n,), generator=gen, device=device)
    return {
        "x": normal(n, d).to(dtype),
        "g": normal(n, out).to(dtype),
        "w": (normal(out, d) / d**0.5).to(dtype),
        "bias": normal(out).to(dtype),
        "u": (normal(out, k) / out**0.5).to(dtype),
        "vh": (normal(k, d) / d**0.5).to(dtype),
        "delta": normal(*shape).float(),
        "task": task,
    }


def exact(t: dict, core: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, p, dx, d delta) in float64; where rows carry tasks, those of one at a time, -1 being none."""
    d = {key: v.double() if v is not None and v.is_floating_point() else v for key, v in t.items()}
    p = d["x"] @ d["vh"].mT
    rest = (d["w"], d["u"], d["vh"])
    if core != "task":
        y = reference.spectral_linear(d["x"], rest[0], d["bias"], *rest[1:], d["delta"], core)
        dx, grad = reference.spectral_linear_backward(d["g"], d["x"], *rest, d["delta"], core)
        return y, p, dx, grad
    y, dx = torch.zeros_like(d["g"]), torch.zeros_like(d["x"])
    grad = torch.zeros_like(d["delta"])
    for task in d["task"].unique():
        own = d["task"] == task
        x, g = d["x"][own], d["g"][own]
        delta = d["delta"][task] if task >= 0 else torch.zeros_like(d["delta"][0])
        y[own] = reference.spectral_linear(x, rest[0], d["bias"], *rest[1:], delta)
        dx[own], share = reference.spectral_linear_backward(g, x, *rest, delta)
        if task >= 0:
            grad[task] = share
    return y, p, dx, grad
