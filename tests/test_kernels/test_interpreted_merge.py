"""`fastspec.merge` of a model on a GPU, under the interpreter: tensors that only claim to be on CUDA."""

from __future__ import annotations

import weakref

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
from fastspec.kernels.launch import watched
from fastspec.model.targets import spectral_layers
from fastspec.nn import together
from fastspec.nn.kept_weight import kept_weight
from fastspec.ops.kept import Room


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
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
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


def test_the_capture_of_a_graph(model, monkeypatch):
    """Weights can't be looked at there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it before, or fastspec"):
        fastspec.merge(model)
    assert not any(layer.merged for _, layer in spectral_layers(model))


def test_a_table_filled_by_launches():
    addresses = torch.tensor([[2**62 + 1, 3], [5, 7]])
    assert torch.equal(merging.filled(addresses, torch.device("cpu")), addresses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("core", ["diag", "dense"])
@pytest.mark.parametrize("size", [(70, 40, 8), (130, 200, 50), (1, 9, 1)], ids=str)
def test_a_kept_copy(size, core, dtype):
    """The operator's ATen formula, bit for bit but where the sums before the rounding differ by theirs.

    With a dense core the kernel's own product with C is one more rounding.
    """
    rows, columns, k = size
    close = 1e-6 if dtype == torch.float32 else 1e-3
    t = problem(1, columns, rows, k, core, dtype)
    operands = (t["w"], t["u"], t["vh"], t["delta"], core)
    out, made_for = torch.full_like(t["w"], float("nan")), torch.zeros_like(t["delta"])
    want, again = torch.empty_like(out), torch.zeros_like(made_for)
    with sanitized():
        kept.keep(out, made_for, *operands, False)
    ops.kept._keep(want, again, *operands, False)
    assert torch.equal(made_for, t["delta"])
    assert core == "dense" or dtype == torch.float32 or (out == want).float().mean() > 0.99
    assert relative_error(out, want) < close
    out.fill_(7.0)
    with sanitized():
        kept.keep(out, made_for, *operands, False)  # made for these coefficients already
        assert (out == 7.0).all()
        kept.keep(out, made_for, *operands, True)
        assert relative_error(out, want) < close
        made_for.copy_(t["delta"].zero_())
        kept.keep(out, made_for, *operands, True)
    assert torch.equal(out, t["w"]), "no shift: W bit for bit"


KINDS = [(40, 24, 5, "diag"), (33, 130, 50, "diag"), (40, 24, 5, "dense")]


@pytest.mark.parametrize("room", [True, False])
def test_copies_of_many_layers(room, monkeypatch):
    """As many calls of the operator: values, coefficients noted, what has changed alone, a bias always."""
    layers = []
    for seed, (rows, columns, k, core) in enumerate(KINDS * 2):
        t = problem(1, columns, rows, k, core, torch.float16, seed)
        place = Room(torch.empty_like(t["w"]))
        if room:  # as Room.like lays them out, in odd sizes
            storage = torch.zeros(rows + k + 1, columns + k + 3, dtype=torch.float16)
            u, vh = storage[:rows, columns : columns + k], storage[rows : rows + k, :columns]
            place = Room(
                storage[:rows, :columns], u.copy_(t["u"]), vh.copy_(t["vh"]), t["bias"] * 0
            )
        rest = (t["bias"], place.bias) if room else (None, None)
        made_for = torch.full_like(t["delta"], float("nan"))
        layers.append((place.effective, made_for, t["w"], t["u"], t["vh"], t["delta"], core, *rest))
    tables = kept.Tables(layers)
    reachable = [t for operands in layers for t in operands if isinstance(t, torch.Tensor)]

    def launched() -> list[str]:
        with sanitized() as watch, watched() as launches:
            watch.reachable = reachable
            tables.launch()
        return [one.kernel.fn.__name__ for one in launches]

    assert launched() == ["keep_all_kernel"] * 3 + ["note_all_kernel"]
    for step in range(3):
        for out, made_for, *operands, core, bias, bias_out in layers:
            want, noted = torch.empty_like(operands[0]), torch.empty_like(made_for)
            ops.kept._keep(want, noted, *operands, core, True)
            assert torch.equal(noted, made_for)
            assert relative_error(out, want) < 1e-3
            assert core == "dense" or (out == want).float().mean() > 0.99
            assert bias is None or torch.equal(bias_out, bias)
        layers[0][0].fill_(7.0)
        layers[1][5].mul_(step + 2.0)
        if room:
            layers[2][7].add_(1.0)
        launched()
        assert (layers[0][0] == 7.0).all(), "made for these coefficients already"
        layers[0][1].fill_(float("nan"))
        launched()


def test_a_kept_copy_with_its_bias():
    t = problem(1, 40, 70, 8, "diag", torch.float16)
    out, made_for, bias = torch.empty_like(t["w"]), t["delta"].clone(), torch.empty_like(t["bias"])
    operands = (out, made_for, t["w"], t["u"], t["vh"], t["delta"], "diag")
    out.fill_(7.0)
    with sanitized():
        kept.keep(*operands, False, t["bias"], bias)
    assert (out == 7.0).all()
    assert torch.equal(bias, t["bias"])


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_kept_together_on_a_gpu(model, bias, monkeypatch):
    """By the tables, from the second forward on; one launch for each kind."""
    for at, layer in enumerate(model.half()):
        assert at or layer._matrix(layer.weight).shape == (40, 24)
    tables = []
    make = kept.Tables
    monkeypatch.setattr(
        kept, "Tables", lambda members: tables.append(len(members)) or make(members)
    )
    fastspec.keep_merged(model)
    layers = list(model)
    for layer in layers:
        kept_weight(layer)
    state = together.Together()
    for layer in layers:
        state.layers[id(layer)] = weakref.ref(layer)
    for scale in (1.0, -2.0):
        for layer in layers:
            layer.delta.data.fill_(scale)
        with watched() as launches:
            fresh = state.refresh()
        assert set(fresh) == set(map(id, layers))
        names = [one.kernel.fn.__name__ for one in launches]
        assert names == ["keep_all_kernel"] * 3 + ["note_all_kernel"]
        for layer in layers:
            assert (
                relative_error(layer._kept.effective, layer._matrix(layer.effective_weight()))
                < 2e-3
            )
    assert tables == [5]
    # while a graph is captured no table is made, and one that it was captured with is not given up
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert state.refresh()
    (captured,) = state.captured
    assert captured is state.keep
    layers[0].delta = nn.Parameter(torch.ones(5))
    layers[0]._kept = None
    kept_weight(layers[0])
    assert state.refresh() == {}
    assert all(layer._kept.captured for layer in layers)
    first = layers[0]._kept
    layers[0].delta = nn.Parameter(torch.ones(5))
    kept_weight(layers[0])
    assert layers[0]._kept.before is first
