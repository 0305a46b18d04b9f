"""A merged copy kept in 16 bits: rounding by thresholds, and what follows the coefficients."""

from __future__ import annotations

import copy

import pytest
import torch
from support import TOLERANCE, assert_close, relative_error
from torch import nn

import fastspec
from fastspec.ops import reference
from fastspec.ops.kept import round_by_threshold, thresholds

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_dtype_holds_stays_bit_for_bit(dtype):
    w = torch.randn(200, 300).to(dtype)
    w[0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("-inf")], dtype=dtype)
    assert torch.equal(round_by_threshold(w.float(), dtype), w)
    assert round_by_threshold(torch.full((2, 2), float("nan")), dtype).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_shifts_survive_on_the_average(dtype):
    """Nearest rounding leaves nothing of them."""
    w = torch.randn(1000, 1000).abs().add(0.5).to(dtype)
    ulp = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(w.float()))
    value = w.float() + 0.1 * ulp
    assert torch.equal(value.to(dtype), w)
    got = round_by_threshold(value, dtype).float()
    assert ((got - value).abs() < ulp).all()
    assert abs(((got - w.float()) / ulp).mean().item() - 0.1) < 2e-3  # 6 standard errors
    assert round_by_threshold(-value, dtype).float().equal(-got)


def test_thresholds_are_uniform_and_fixed():
    t = thresholds(512, 512, 16).double() / 2**16
    assert torch.equal(thresholds(512, 512, 16), thresholds(512, 512, 16))
    assert abs(t.mean() - 0.5) < 4e-3
    assert abs(t.var() - 1 / 12) < 1e-3
    for shifted in (t.roll(1, 0), t.roll(1, 1), t.mT):
        assert abs(((t - 0.5) * (shifted - 0.5)).mean()) < 1e-3


def adapted(core: str, dtype=torch.bfloat16) -> fastspec.SpectralLinear:
    torch.manual_seed(0)
    plain = nn.Linear(48, 40, dtype=dtype)
    layer = fastspec.SpectralLinear.from_linear(plain, 8, core=core)
    layer.keep_merged()
    return layer


@pytest.mark.parametrize("core", ["diag", "dense"])
def test_a_layer_with_a_kept_copy(core):
    layer = adapted(core)
    x = torch.randn(4, 30, 48, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(layer(x), layer._plain(x)), "no shift: the pretrained layer"
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    nn.init.normal_(layer.delta, std=0.3)
    y = layer(x)
    g = torch.randn_like(y)
    dx, ddelta = torch.autograd.grad(y, (x, layer.delta), g)
    lean = copy.deepcopy(layer)
    lean.keep_merged(False)
    lean.path = "reference"
    lean.double()
    exact = lean(x.double())
    wide = torch.autograd.grad(exact, (x, lean.delta), g.double())
    for got, want in ((y, exact), (dx, wide[0]), (ddelta, wide[1])):
        assert relative_error(got, want) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("core", ["diag", "dense"])
def test_the_copy_follows_the_coefficients(core):
    layer = adapted(core)
    w, f = layer.weight.float(), layer.factors
    x = torch.eye(48, dtype=torch.bfloat16)

    def shift() -> torch.Tensor:
        with torch.no_grad():
            return layer._kept_weight().float() - w

    for change in (
        lambda: nn.init.normal_(layer.delta),
        lambda: layer.delta.data.mul_(2.0),  # past the version counter
        lambda: setattr(layer, "delta", nn.Parameter(torch.randn_like(layer.delta))),
        lambda: layer.load_state_dict(adapted(core).state_dict()),
    ):
        change()
        want = reference.effective_weight(
            torch.zeros_like(w), f.u.float(), f.vh.float(), layer.delta.detach(), core
        )
        assert_close(shift() + w, (want + w).double(), torch.bfloat16)
        assert (shift() == 0).all() == (layer.delta == 0).all()
    assert layer(x).isfinite().all()


def test_a_graph_keeps_the_copy_it_was_made_with():
    layer = adapted("diag")
    x = torch.randn(3, 48, dtype=torch.bfloat16, requires_grad=True)
    want = layer._plain(x).sum()
    (want,) = torch.autograd.grad(want, x)
    first = layer(x).sum()
    own, layer.delta = layer.delta, nn.Parameter(torch.randn(8))
    layer(x)
    (dx,) = torch.autograd.grad(first, x)
    assert torch.equal(dx, want)
    assert own.eq(0).all()
