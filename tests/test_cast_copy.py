"""Under autocast on a GPU a frozen float32 weight is cast once; CPU tensors stand in for those of a GPU."""

import copy
import pickle

import pytest
import torch
from support import assert_close
from torch import nn

import fastspec
from fastspec import SpectralLinear
from fastspec.ops import cuda, functional

BF16 = torch.bfloat16
X = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = SpectralLinear.from_linear(nn.Linear(24, 40), rank=5)
    nn.init.normal_(made.delta)
    return made


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "serves", lambda device: True)


@pytest.fixture
def given(monkeypatch):
    """The weights that the operator was called with."""
    weights = []
    call = functional.spectral_operator.spectral_linear
    monkeypatch.setattr(
        functional.spectral_operator,
        "spectral_linear",
        lambda x, weight, *rest: weights.append(weight) or call(x, weight, *rest),
    )
    return weights


def step(layer, dtype=BF16):
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x)
    y.float().square().sum().backward()
    grads = x.grad, layer.delta.grad
    layer.delta.grad = None
    return y.detach(), *grads


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_it_computes_what_casting_in_every_call_does(layer, monkeypatch, dtype):
    got = step(layer, dtype)
    monkeypatch.setattr("fastspec.nn.layer.wanted_dtype", lambda weight: None)
    assert layer._cast_copy is not None
    for a, b in zip(got, step(layer, dtype), strict=True):
        assert_close(a, b, dtype)
    assert got[0].dtype == dtype


def test_the_weight_is_cast_once(layer, given):
    for _ in range(3):
        step(layer)
    assert {w.dtype for w in given} == {BF16}
    assert len({w.data_ptr() for w in given}) == 1
    assert layer.weight.dtype == layer.u.dtype == torch.float32


def test_with_zero_coefficients_it_is_the_pretrained_layer(layer):
    nn.init.zeros_(layer.delta)
    with torch.autocast("cpu", BF16):
        assert torch.equal(layer(X), nn.functional.linear(X, layer.weight, layer.bias))


def test_another_weight_gets_another_copy(layer, given):
    nn.init.zeros_(layer.delta)
    step(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    step(layer)
    torch.testing.assert_close(given[1], layer.weight.to(BF16), rtol=0, atol=0)
    layer.weight = nn.Parameter(layer.weight.detach() + 1, requires_grad=False)
    step(layer)
    torch.testing.assert_close(given[2], layer.weight.to(BF16), rtol=0, atol=0)
    layer.load_state_dict({n: t + 1 for n, t in layer.state_dict().items()})
    step(layer)
    torch.testing.assert_close(given[3], layer.weight.to(BF16), rtol=0, atol=0)


def test_another_dtype_gets_another_copy(layer, given):
    for dtype in (BF16, torch.float16, BF16):
        step(layer, dtype)
    assert [w.dtype for w in given] == [BF16, torch.float16, BF16]


def test_who_gets_none(layer, given):
    layer(X)
    layer.double()
    with torch.autocast("cpu", BF16):
        layer(X.double())
    layer.to(BF16)
    with torch.autocast("cpu", BF16):
        layer(X.to(BF16))
    assert layer._cast_copy is None
    layer.float().weight.requires_grad_(True)
    step(layer)
    assert layer._cast_copy is None


def test_copies_casts_and_pickles_have_none(layer):
    step(layer)
    state = layer.state_dict()
    assert state.keys() == {"weight", "bias", "delta"}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._cast_copy is None
        for a, b in zip(step(other), step(layer), strict=True):
            assert torch.equal(a, b)
    assert layer.double()._cast_copy is None
    assert not hasattr(layer.unload(), "_cast_copy")


def test_made_under_inference_mode_it_trains(layer):
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        layer(X)
    kept = layer._cast_copy
    assert kept is not None
    step(layer)
    assert layer._cast_copy is kept


def test_a_batch_of_several_tasks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    fastspec.spectralize(model, fastspec.SpectralConfig(rank=4))
    for name, shift in (("a", 0.5), ("b", -0.5)):
        fastspec.add_task(model, name, current=True)
        nn.init.constant_(model[0].delta, shift)
        fastspec.set_task(model, name)
    with fastspec.tasks(["a", "b", None] * 2), torch.autocast("cpu", BF16):
        got = model(X)
        assert model[0]._cast_copy is not None
        assert torch.equal(model(X), got)
    with fastspec.tasks(["a", "b", None] * 2):
        assert_close(got, model(X), BF16)
