"""`fastspec.merge` of a model on a GPU, under the interpreter: tensors that only claim to be on CUDA."""

from __future__ import annotations

import pytest
import torch
from support import assert_close
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastspec
from fastspec.kernels import merge as merging
from fastspec.model.targets import spectral_layers


@pytest.fixture
def model(monkeypatch):
    torch.manual_seed(0)
    layers = [
        nn.Linear(24, 40),
        Conv1D(24, 40),
        nn.Linear(24, 40),
        Conv1D(24, 40),
        nn.Linear(40, 7),
    ]
    config = fastspec.SpectralConfig(rank=5, target_modules=tuple("01234"))
    found = fastspec.spectralize(nn.Sequential(*layers), config)
    for _, layer in spectral_layers(found):
        nn.init.normal_(layer.delta)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True), raising=False)
    return found


def test_one_launch_for_each_kind(model, monkeypatch):
    launches = []
    one = merging.merge
    monkeypatch.setattr(merging, "merge", lambda *a: launches.append(1) or one(*a))
    before = [layer.weight.clone() for _, layer in spectral_layers(model)]
    want = [layer.effective_weight() for _, layer in spectral_layers(model)]
    fastspec.merge(model)
    assert len(launches) == 3
    for (_, layer), effective in zip(spectral_layers(model), want, strict=True):
        assert layer.merged
        assert layer.weight.stride() == effective.stride()
        assert_close(layer.weight, effective)
    fastspec.unmerge(model)
    for (_, layer), weight in zip(spectral_layers(model), before, strict=True):
        assert torch.equal(layer.weight, weight)


def test_what_is_not_finite_is_named_and_nothing_is_merged(model):
    name, layer = list(spectral_layers(model))[3]
    with torch.no_grad():
        layer.delta[0] = float("inf")
    with pytest.raises(ValueError, match=f"{name}: the merged weight is not finite"):
        fastspec.merge(model)
    assert not any(layer.merged for _, layer in spectral_layers(model))
