"""`fastspec.merge` of a model on a GPU, under the interpreter: tensors that only claim to be on CUDA."""

from __future__ import annotations

import pytest
import torch
from kernel_problems import problem
from kernel_sanitizer import sanitized
from support import assert_close, relative_error
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastspec
import fastspec.ops.kept
from fastspec import ops
from fastspec.kernels import kept
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


@pytest.mark.parametrize("core", ["diag", "dense"])
@pytest.mark.parametrize("size", [(70, 40, 8), (130, 200, 50), (1, 9, 1)], ids=str)
def test_a_kept_copy(size, core):
    """The operator's ATen formula, bit for bit but where the sums before the rounding differ by theirs.

    With a dense core the kernel's own product with C is one more rounding.
    """
    rows, columns, k = size
    t = problem(1, columns, rows, k, core, torch.float16)
    operands = (t["w"], t["u"], t["vh"], t["delta"], core)
    out, made_for = torch.full_like(t["w"], float("nan")), torch.zeros_like(t["delta"])
    want, again = torch.empty_like(out), torch.zeros_like(made_for)
    with sanitized():
        kept.keep(out, made_for, *operands, False)
    ops.kept._keep(want, again, *operands, False)
    assert torch.equal(made_for, t["delta"])
    assert core == "dense" or (out == want).float().mean() > 0.99
    assert relative_error(out, want) < 1e-3
    out.fill_(7.0)
    with sanitized():
        kept.keep(out, made_for, *operands, False)  # made for these coefficients already
        assert (out == 7.0).all()
        kept.keep(out, made_for, *operands, True)
        assert relative_error(out, want) < 1e-3
        made_for.copy_(t["delta"].zero_())
        kept.keep(out, made_for, *operands, True)
    assert torch.equal(out, t["w"]), "no shift: W bit for bit"
