"""Dense cores that are made from fewer numbers: parametrisations of `delta`."""

from __future__ import annotations

import copy

import pytest
import torch
from glue_support import trained_by_map
from support import assert_close
from torch import nn
from torch.nn.utils import parametrize

import fastspec
from fastspec.cores import core_matrix
from fastspec.model.targets import spectral_layers
from fastspec.studies import core_maps
from fastspec.studies.glue.config import CORE_MAPS, GlueConfig

K = 6


def adapted(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7)).to(dtype)
    config = fastspec.SpectralConfig(rank=K, core="dense", target_modules=["0", "2"])
    return core_maps.install(fastspec.spectralize(model, config), name)


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", CORE_MAPS)
def test_a_map(name):
    """Zero at the start; then what the layer computes is the core that it makes."""
    assert set(CORE_MAPS) == set(trained_by_map(K)) == {*core_maps.MAPS, "tied"}
    model = adapted(name)
    layers = [layer for _, layer in spectral_layers(model)]
    for layer in layers:
        assert layer.delta.abs().max() < 1e-6
    shaken(model)
    x = torch.randn(5, 9)
    y = model(x)
    for layer in layers:
        assert layer.delta.abs().max() > 0.01
    want = layers[0](x)
    assert_close(want, x @ layers[0].effective_weight().T + layers[0].bias)
    y.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * trained_by_map(K)[name]
    assert all(p.grad is not None and p.grad.any() for p in trained if p.numel())


@pytest.mark.parametrize("name", [n for n in CORE_MAPS if n != "tied"])
def test_the_gradient_of_a_map(name):
    layer = next(layer for _, layer in spectral_layers(adapted(name)))
    made = copy.deepcopy(layer.parametrizations.delta[0]).double()
    start = made.right_inverse(torch.zeros(K, K))
    numbers = [start] if isinstance(start, torch.Tensor) else list(start)
    numbers = [(t + 0.3 * torch.randn_like(t)).double().requires_grad_() for t in numbers]
    assert torch.autograd.gradcheck(made, numbers)


def test_what_the_cores_are():
    hartley = next(m for _, m in spectral_layers(adapted("hartley"))).parametrizations.delta[0]
    (transform,) = hartley.transforms
    assert_close(transform @ transform.T, torch.eye(K))
    layer = next(m for _, m in spectral_layers(shaken(adapted("cayley"))))
    numbers = layer.parametrizations.delta
    rotation = (layer.delta + layer.s.diag()) / (numbers.original2 * layer.s)
    rotation = rotation / numbers.original1[:, None]
    assert (rotation @ rotation.T - torch.eye(K)).abs().max() < 1e-5
    first, second = (m for _, m in spectral_layers(adapted("tied")))
    tables = [m.parametrizations.delta[0].shared for m in (first, second)]
    assert tables[0] is tables[1]
    for name, axis in (("left", 1), ("right", 0)):
        layer = next(m for _, m in spectral_layers(adapted(name)))
        nn.init.ones_(layer.parametrizations.delta.original)
        assert_close(layer.delta.mean(axis), layer.s / layer.s.mean())


@pytest.mark.parametrize("move", ["double", "deepcopy", "state dict"])
def test_a_layer_whose_coefficients_are_parametrised(move):
    """torch's parametrisation owns them: casts, copies and state dicts go past the layer's own care."""
    model = shaken(adapted("hartley"))
    x = torch.randn(5, 9)
    want = model(x)
    if move == "double":
        assert_close(model.double()(x.double()).float(), want)
    elif move == "deepcopy":
        assert torch.equal(copy.deepcopy(model)(x), want)
    else:
        fresh = adapted("hartley")
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), want)
    assert parametrize.is_parametrized(model[0], "delta")


def test_a_band_in_proportion_to_the_spectrum():
    config = fastspec.SpectralConfig(rank=K, core="band", target_modules=["0"])
    model = core_maps.install(fastspec.spectralize(nn.Sequential(nn.Linear(9, 8)), config), "left")
    nn.init.ones_(model[0].parametrizations.delta.original)
    scale = model[0].s / model[0].s.mean()
    assert_close(core_matrix(model[0].delta, "band"), scale[:, None] * band_of_ones())


def band_of_ones() -> torch.Tensor:
    return torch.ones(K, K).triu(-1).tril(1)


@pytest.mark.parametrize(
    "fields",
    [
        {"core_map": "hartley"},
        {"core": "dense", "core_map": "x"},
        {"method": "full", "core_map": "left"},
    ],
)
def test_what_a_map_belongs_to(fields):
    GlueConfig(task="rte", core_map="left")
    with pytest.raises(ValueError, match="core_map must be one of"):
        GlueConfig(task="rte", **fields)
