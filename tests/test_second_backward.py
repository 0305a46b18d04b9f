"""A backward pass that is differentiated itself: Hessian-vector products, gradient penalties."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

import fastspec
from fastspec.ops import reference
from fastspec.ops.plan import Plan

CORES = ("diag", "band", "dense")
PLANS = (
    Plan("merged", "two_sided"),
    Plan("factored", "two_sided"),
    Plan("merged", "dense"),
    Plan("saved", "dense"),
    Plan("merged", "short"),
    Plan("spectral", "two_sided"),
)
SIZES = {"wide": (4, 6), "tall": (6, 4)}  # out, in


def operands(core: str, out: int, d: int, k: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(out, d, generator=g, dtype=torch.float64))
    weight = u[:, :4] * s @ vh[:4]
    shape = {"diag": (k,), "band": (3, k), "dense": (k, k)}[core]
    return {
        "x": torch.randn(2, 3, d, generator=g, dtype=torch.float64),
        "weight": weight,
        "bias": torch.randn(out, generator=g, dtype=torch.float64),
        "u": u[:, :k].contiguous(),
        "s": s[:k].contiguous(),
        "vh": vh[:k].contiguous(),
        "delta": 0.1 * torch.randn(shape, generator=g, dtype=torch.float64),
    }


def legal(core: str, plan: Plan) -> bool:
    return not (core == "band" and plan.gradient == "short")


CASES = [(c, p, n) for c, p, n in product(CORES, PLANS, SIZES) if legal(c, p)]


@pytest.mark.parametrize(("core", "plan", "name"), CASES, ids=str)
def test_every_plan_has_a_second_derivative(core, plan, name):
    t = operands(core, *SIZES[name], k=4 if plan.forward == "spectral" else 3)
    trained = [t[n].requires_grad_() for n in ("x", "bias", "delta")]

    def call(x: Tensor, bias: Tensor, delta: Tensor) -> Tensor:
        return fastspec.spectral_linear(
            x, t["weight"], bias, t["u"], t["s"], t["vh"], delta,
            core=core, singular_basis=True, plan=plan,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, trained)
    assert torch.autograd.gradgradcheck(call, trained)


@pytest.mark.parametrize(("core", "name"), list(product(CORES, SIZES)), ids=str)
def test_many_tasks_have_a_second_derivative(core, name):
    t = operands(core, *SIZES[name], k=3)
    table = torch.stack([t["delta"], -2 * t["delta"]])
    task = torch.tensor([1, -1])
    trained = [t["x"].requires_grad_(), t["bias"].requires_grad_(), table.requires_grad_()]

    def call(x: Tensor, bias: Tensor, table: Tensor) -> Tensor:
        return fastspec.task_linear(
            x, t["weight"], bias, t["u"], t["s"], t["vh"], table, task,
            core=core, singular_basis=True,
        )  # fmt: skip

    assert torch.autograd.gradgradcheck(call, trained)


def test_a_gradient_penalty_is_the_references():
    """Through a whole layer, whose plan is its own choice and whose coefficients are float32."""
    torch.manual_seed(0)
    layer = fastspec.SpectralLinear(24, 16, rank=4, dtype=torch.float64)
    with torch.no_grad():
        layer.delta.normal_()
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (layer.delta, x))

    plain = reference.spectral_linear(x, layer.weight, layer.bias, layer.u, layer.vh, layer.delta)
    for got, want in zip(penalty(layer(x)), penalty(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(os.environ.get("FASTSPEC_NO_EXT") == "1", reason="this is that run")
def test_without_the_compiled_part_too():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "FASTSPEC_NO_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
