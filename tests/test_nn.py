"""`SpectralLinear` as a module: one contract, held by every core, basis and storage layout."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import assert_close, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastspec
from fastspec import SpectralLinear
from fastspec.cores import CORES
from fastspec.ops import reference
from fastspec.ops.plan import Plan

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def linear(in_features=24, out_features=40, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias, dtype=dtype)


def conv1d(in_features=24, out_features=40, seed=0):
    transformers = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(seed)
    conv = transformers.Conv1D(out_features, in_features)
    nn.init.normal_(conv.bias)
    return conv


def adapted(kind="linear", plain=None, **options):
    if kind == "linear":
        return SpectralLinear.from_linear(plain or linear(), **{"rank": 6, **options})
    return fastspec.SpectralConv1D.from_conv1d(plain or conv1d(), **{"rank": 6, **options})


def perturb(layer, scale=0.1, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.delta.copy_(scale * torch.randn(layer.delta.shape, generator=g))
    return layer


def exact(layer, x):
    w = layer._matrix(layer.weight).double()
    bias = None if layer.bias is None else layer.bias.double()
    return reference.spectral_linear(
        x.double(), w, bias, layer.u.double(), layer.vh.double(), layer.delta.double(), layer.core
    )


@pytest.fixture(params=["linear", "conv1d"])
def kind(request):
    return request.param


@pytest.mark.parametrize("core", CORES)
class TestContract:
    def test_starts_as_the_pretrained_layer_bit_for_bit(self, kind, core):
        plain = linear() if kind == "linear" else conv1d()
        x = torch.randn(3, 5, 24)
        y = plain(x)
        layer = adapted(kind, plain, core=core)
        assert torch.equal(layer(x), y)
        for forward in ("merged", "factored"):
            layer.forced_plan = Plan(forward, "two_sided")
            assert torch.equal(layer(x), y)

    def test_only_delta_is_trained(self, kind, core):
        layer = adapted(kind, core=core)
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["delta"]
        assert layer.delta.dtype == torch.float32
        expected = {"diag": (6,), "band": (3, 6), "dense": (6, 6), "low_rank": (2, 6)}[core]
        assert layer.delta.shape == expected
        assert sorted(layer.state_dict()) == ["bias", "delta", "weight"]

    def test_matches_the_reference(self, kind, core):
        layer = perturb(adapted(kind, core=core))
        for shape in [(24,), (7, 24), (2, 3, 24), (2, 0, 24), (0, 24)]:
            x = torch.randn(shape)
            assert_close(layer(x), exact(layer, x))

    def test_training_step(self, kind, core):
        layer = perturb(adapted(kind, core=core))
        other = copy.deepcopy(layer)
        other.path = "reference"
        x, g = torch.randn(2, 9, 24), torch.randn(2, 9, 40)
        grads = []
        for module in (layer, other):
            xi = x.clone().requires_grad_()
            module(xi).backward(g)
            grads.append((xi.grad, module.delta.grad))
        for a, b in zip(*grads, strict=True):
            assert_close(a, b)

    def test_merge_and_exact_unmerge(self, kind, core):
        layer = perturb(adapted(kind, core=core))
        base, x = layer.weight.clone(), torch.randn(4, 24)
        y = layer(x)
        state = copy.deepcopy(layer.state_dict())
        layer.merge()
        assert layer.merged
        assert_close(layer(x), y)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        layer.merge()
        layer.unmerge()
        assert torch.equal(layer.weight, base)
        assert torch.equal(layer(x), y)

    def test_a_kept_merged_weight_follows_the_coefficients(self, kind, core, monkeypatch):
        layer, lean = perturb(adapted(kind, core=core)), perturb(adapted(kind, core=core))
        made = []
        merge = type(layer)._merged_weight
        monkeypatch.setattr(
            type(layer), "_merged_weight", lambda self: made.append(1) or merge(self)
        )
        layer.keep_merged()
        x, g = torch.randn(2, 9, 24), torch.randn(2, 9, 40)
        with torch.inference_mode():
            layer(x)
        for scale in (0.1, 0.2, 0.3):
            perturb(layer, scale)
            perturb(lean, scale)
            for _ in range(2):  # two batches between two optimiser steps
                grads = []
                for module in (layer, lean):
                    xi = x.clone().requires_grad_()
                    y = module(xi)
                    y.backward(g)
                    grads.append((y, xi.grad, module.delta.grad))
                for a, b in zip(*grads, strict=True):
                    assert_close(a, b)
        assert len(made) == 3
        layer.delta.data.zero_()  # past the version counter
        with torch.no_grad():
            assert torch.equal(layer(x), layer._plain(x))
        layer.delta.data.fill_(0.5)
        assert_close(layer(x), exact(layer, x))
        layer.keep_merged(False)
        assert layer._kept is None

    def test_to_linear(self, kind, core):
        layer = perturb(adapted(kind, core=core))
        plain, x = layer.to_linear(), torch.randn(4, 24)
        assert type(plain) is nn.Linear
        assert_close(plain(x), exact(layer, x))
        with torch.no_grad():
            plain.bias.zero_()
        assert layer.bias.abs().sum() > 0, "the copy must not share its bias"

    def test_deepcopy_pickle_and_torch_save(self, kind, core):
        layer = perturb(adapted(kind, core=core))
        x = torch.randn(4, 24)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for clone in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ):
            assert torch.equal(clone(x), layer(x))
            clone.delta.data.add_(1)
            assert not torch.equal(clone(x), layer(x))

    def test_casts_keep_the_coefficients_in_float32(self, kind, core):
        layer = perturb(adapted(kind, core=core))
        delta, s = layer.delta.detach().clone(), layer.s.clone()
        layer(torch.randn(3, 24)).sum().backward()
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            layer.to(dtype)
            assert layer.weight.dtype == layer.u.dtype == dtype
            assert layer.delta.dtype == layer.s.dtype == torch.float32
            assert torch.equal(layer.delta, delta)
            assert torch.equal(layer.s, s)
            assert layer.delta.grad.dtype == torch.float32
            assert layer(torch.randn(3, 24, dtype=dtype)).dtype == dtype
        assert not layer.singular_basis, "factors rounded to 16 bits are no singular basis any more"
        assert layer.plan(4096).gradient != "short"

    def test_gradient_checkpointing(self, kind, core):
        layer = perturb(adapted(kind, core=core))
        x = torch.randn(4, 24, requires_grad=True)
        layer(x).square().sum().backward()
        expected = layer.delta.grad.clone()
        layer.delta.grad = None
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        assert torch.equal(layer.delta.grad, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(24, 40), (40, 24), (1, 5), (32, 32)])
def test_dtypes(dtype, bias, sizes):
    plain = linear(*sizes, bias, dtype)
    x = torch.randn(3, sizes[0], dtype=dtype)
    y = plain(x)
    layer = SpectralLinear.from_linear(plain, rank=1)
    assert torch.equal(layer(x), y)
    assert_close(perturb(layer)(x), exact(layer, x), dtype)


def test_is_an_nn_linear_and_adopts_its_tensors():
    plain = linear()
    layer = SpectralLinear.from_linear(plain, rank=6)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert type(plain) is nn.Linear, "the original must stay what it was"
    assert "delta" not in dict(plain.named_parameters())


def test_constructor_like_nn_linear():
    torch.manual_seed(3)
    layer = SpectralLinear(10, 20, rank=4)
    torch.manual_seed(3)
    assert torch.equal(layer.weight, nn.Linear(10, 20).weight)
    assert SpectralLinear(10, 20, False, rank=2).bias is None


def test_meta_construction_then_loading():
    plain = linear()
    layer = SpectralLinear(24, 40, rank=6, device="meta")
    layer.load_state_dict(plain.state_dict(), assign=True)
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), plain(x))
    assert_close(perturb(layer)(x), exact(layer, x))
    assert_close(layer.u.mT @ layer.u, torch.eye(6))


@pytest.mark.parametrize(
    ("select", "start", "stop"), [("leading", 0, 6), ("trailing", 18, 24), ((3, 9), 3, 9)]
)
def test_select(select, start, stop):
    layer = SpectralLinear.from_linear(linear(), rank=6, select=select)
    u, s, _ = torch.linalg.svd(layer.weight.double(), full_matrices=False)
    assert_close(layer.s, s[start:stop], torch.float32)
    overlap = torch.linalg.svdvals(layer.u.double().mT @ u[:, start:stop])
    assert (overlap > 1 - 1e-6).all()


def test_random_basis_is_orthonormal_reproducible_and_of_its_weight():
    a, b = (adapted(basis="random") for _ in range(2))
    other = adapted(plain=linear(seed=5), basis="random")
    assert torch.equal(a.u, b.u)
    assert relative_error(other.u, a.u) > 0.5
    assert_close(a.u.mT @ a.u, torch.eye(6))
    assert_close(a.vh @ a.vh.mT, torch.eye(6))
    assert not a.singular_basis
    x = torch.randn(4, 24)
    assert_close(perturb(a)(x), exact(a, x))
    assert relative_error(adapted(basis="random", seed=1).u, a.u) > 0.5


def test_train_bias():
    layer = adapted(train_bias=True)
    layer(torch.randn(5, 24)).sum().backward()
    assert_close(layer.bias.grad, torch.full((40,), 5.0))


class TestStateDicts:
    def test_a_plain_state_loads_and_resets_the_shift(self):
        plain = linear()
        layer = perturb(adapted(plain=copy.deepcopy(plain)))
        assert layer.load_state_dict(plain.state_dict()) == ([], [])
        x = torch.randn(3, 24)
        assert torch.equal(layer(x), plain(x))

    @pytest.mark.parametrize("basis", ["svd", "random"])
    def test_changed_weights_never_meet_the_old_basis(self, basis):
        layer = adapted(basis=basis)
        other = linear(seed=7)
        layer.load_state_dict(other.state_dict())
        fresh = adapted(plain=other, basis=basis)
        assert torch.equal(layer.u, fresh.u)
        assert torch.equal(layer.s, fresh.s)
        assert torch.equal(perturb(layer)(torch.ones(1, 24)), perturb(fresh)(torch.ones(1, 24)))

    def test_own_state_with_other_weights(self):
        source = perturb(adapted(plain=linear(seed=7)))
        layer = adapted()
        layer.load_state_dict(source.state_dict())
        x = torch.randn(3, 24)
        assert torch.equal(layer(x), source(x))

    def test_unchanged_weights_keep_their_factors(self):
        layer = perturb(adapted())
        u = layer.u
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
        assert layer.u is u

    def test_loading_into_a_merged_layer(self):
        layer = perturb(adapted())
        state = copy.deepcopy(layer.state_dict())
        x = torch.randn(3, 24)
        y = layer(x)
        layer.merge()
        layer.load_state_dict(state)
        assert not layer.merged
        assert torch.equal(layer(x), y)

    def test_missing_weights_are_still_reported(self):
        with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
            adapted().load_state_dict({"bias": torch.zeros(40)})


def test_merge_refuses_values_that_are_not_finite():
    layer = adapted()
    layer.delta.data[2] = float("nan")
    base = layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_is_done_in_float32(dtype):
    layer = perturb(adapted(plain=linear(dtype=dtype)))
    w = layer.weight.double() + layer.u.double() @ layer.delta.double().diag() @ layer.vh.double()
    layer.merge()
    # at most half a unit in the last place, plus float32 rounding: a 16-bit sum would lose more
    ulp = torch.finfo(dtype).eps * w.abs()
    assert ((layer.weight.double() - w).abs() <= 0.5 * ulp + 1e-6).all()


def test_merged_layer_moves_with_its_base_weight():
    layer = perturb(adapted())
    layer.merge()
    layer.to(torch.float64)
    layer.unmerge()
    assert layer.weight.dtype == torch.float64


def test_a_merged_layer_is_a_plain_linear_call():
    layer = perturb(adapted())
    layer.merge()
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_autocast():
    layer, x = perturb(adapted()), torch.randn(5, 24)
    for path in ("fast", "reference"):
        layer.path = path
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert_close(y, exact(layer, x), torch.bfloat16)
        y.float().sum().backward()
        assert layer.delta.grad.dtype == torch.float32


def test_autocast_starts_as_the_pretrained_layer():
    plain, x = linear(), torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = plain(x)
        assert torch.equal(SpectralLinear.from_linear(plain, rank=6)(x), y)


def test_printing_shows_rank_core_dtype_and_plan():
    text = repr(adapted(core="band", half_width=2))
    assert "rank=6" in text
    assert "core=band(2)" in text
    assert "float32" in text
    assert "at 2048 rows" in text
    layer = adapted()
    layer.merge()
    assert "merged" in repr(layer)


def test_errors():
    with pytest.raises(ValueError, match=r"rank 25 .*min\(in, out\) = 24"):
        SpectralLinear.from_linear(linear(), rank=25)
    with pytest.raises(ValueError, match="select must be"):
        SpectralLinear.from_linear(linear(), rank=2, select="middle")
    plain = linear()
    plain.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        SpectralLinear.from_linear(plain, rank=2)
    with pytest.raises(ValueError, match="finite"):
        SpectralLinear.from_linear(plain, rank=2, basis="random")
    assert plain.weight.requires_grad, "a failed conversion must leave the layer as it was"
    with pytest.raises(TypeError, match="unknown options"):
        adapted("conv1d", colour="red")


@pytest.mark.parametrize("basis", ["svd", "random"])
@pytest.mark.parametrize("size", [(24, 40), (40, 24), (40, 40)], ids=str)
def test_factors_lie_in_rows(size, basis):
    """TMA fetches rows alone, and the products of a CPU are tuned to them."""
    layer = SpectralLinear(*size, rank=8, basis=basis)
    assert layer.u.is_contiguous()
    assert layer.vh.is_contiguous()
