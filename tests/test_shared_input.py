"""Query, key and value in one product (fastspec/nn/shared_input.py, csrc/cuda_shared_input.cpp)."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support import TOLERANCE, relative_error
from test_joined import as_on_cuda, products, pytestmark  # noqa: F401  (a fixture and a mark)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastspec
from fastspec.model.targets import spectral_layers
from fastspec.nn import together
from fastspec.ops import reference

BF16 = torch.bfloat16
WIDTH, RANK = 32, 5
NAMES = ("query", "key", "value", "last")


class Model(nn.Module):
    """As much of an attention as there has to be."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        for name in NAMES[:3]:
            setattr(self, name, nn.Linear(WIDTH, WIDTH - 8 * (name == "value"), bias=bias))
        self.last = nn.Linear(WIDTH - 8, 16, bias=bias)
        self.before_key = lambda x: x
        self.checkpointed = False

    def run(self, x: Tensor) -> Tensor:
        q = self.query(x)
        k = self.key(self.before_key(x))
        v = self.value(x)
        mixed = torch.softmax(q.float() @ k.float().mT / 6, -1).to(v.dtype) @ v
        return self.last(mixed)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)


def adapted(bias: bool = True, core: str = "diag", dtype: torch.dtype = BF16) -> nn.Module:
    torch.manual_seed(0)
    config = fastspec.SpectralConfig(
        rank=RANK, core=core, target_modules=list(NAMES), modules_to_save=[]
    )
    found = fastspec.spectralize(Model(bias).to(dtype), config)
    for _, layer in spectral_layers(found):
        nn.init.normal_(layer.delta, std=0.3)
    return fastspec.keep_merged(found)


@pytest.fixture
def model() -> nn.Module:
    return adapted()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1)).to(BF16)


def plain(model: nn.Module) -> nn.Module:
    """The plain formulas in float64, on the same factors and coefficients."""
    other = fastspec.keep_merged(copy.deepcopy(model), False)
    for _, layer in spectral_layers(other):
        layer.path = "reference"
        layer.delta.data.copy_(dict(spectral_layers(model))[_].delta)
    return other.double()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """y, dx and the gradient of every coefficient."""
    x = x.clone().requires_grad_()
    y = model(x)
    deltas = [layer.delta for _, layer in spectral_layers(model)]
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, [x, *deltas], g.to(y.dtype))]


def check(model: nn.Module, x: Tensor) -> None:
    for got, exact in zip(gradients(model, x), gradients(plain(model), x.double()), strict=True):
        assert got.shape == exact.shape
        assert relative_error(got, exact) < 3 * TOLERANCE[BF16]


def groups(model: nn.Module) -> dict:
    return together._known[model].sharing.groups


def counted(model: nn.Module, x: Tensor) -> int:
    """Products of a forward and backward with as many columns as all three and their ranks."""
    with products() as seen:
        gradients(model, x)
    return sum(shape == (21, WIDTH, 3 * WIDTH - 8 + 24) for shape in seen)


# five directions take eight columns each
SHARED = (21, 32, (32 + 32 + 24) + 24)
BACKWARD = [(21, out, 32 + 24) for out in (32, 32, 24)]


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_for_three(bias, x):
    model = adapted(bias)
    check(model, x)
    assert [group.outs for group in groups(model).values()] == [[32, 32, 24]]
    for _ in range(2):
        check(model, x)
    with products() as seen:
        gradients(model, x)
    # its g U and dx are two, dx being wider
    of_last = [(21, 24, 16 + 8), (21, 16, 24), (21, 16, 5)]
    assert [shape for shape in seen if shape not in of_last] == [SHARED, *BACKWARD]


def test_new_coefficients_are_seen(model, x):
    for seed in range(4):
        gen = torch.Generator().manual_seed(seed)
        for _, layer in spectral_layers(model):  # past the version counters
            layer.delta.data.copy_(torch.randn(RANK, generator=gen))
        check(model, x)
    assert counted(model, x) == 1


def test_no_gradient_no_projection(model, x):
    model(x)
    with torch.no_grad():
        model(x)
        with products() as seen:
            y = model(x)
    assert seen[0] == (21, 32, 88)
    assert relative_error(y, plain(model)(x.double())) < TOLERANCE[BF16] * 3


def test_inference_mode_computes_apart(model, x):
    model(x)
    with torch.inference_mode():
        y = model(x + 0)
    assert relative_error(y, plain(model)(x.double())) < TOLERANCE[BF16] * 3
    assert counted(model, x) == 1


# what happens to x between query and key
BETWEEN = {
    "another tensor": lambda x: x * 1,
    "a view of it": lambda x: x[:],
    "written to": lambda x: x.mul_(2.0),
    "written to and back": lambda x: x.mul_(2.0).div_(2.0),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_another_x_is_another_x(model, x, what):
    model(x)
    model(x)
    assert groups(model)
    model.before_key = BETWEEN[what]
    with torch.no_grad():
        exact = plain(model)(x.double())
        assert relative_error(model(x.clone()), exact) < 3 * TOLERANCE[BF16]
        assert relative_error(model(x.clone()), exact) < 3 * TOLERANCE[BF16]
    if what != "written to":  # autograd refuses to write to a leaf
        model.before_key = lambda x: BETWEEN[what](x + 0) if "written" in what else BETWEEN[what](x)
        check(model, x)
    assert id(model.query) not in groups(model), "given up for good"
    model.before_key = lambda x: x
    check(model, x)
    assert id(model.query) not in groups(model)


def test_hooks_are_called_and_obeyed(model, x):
    model(x)
    calls = []

    def doubled(module, args, output):
        calls.append("forward")
        return output * 2

    def halved(module, args):
        calls.append("pre")
        return (args[0] / 2,)

    lean = plain(model)
    handles = []
    for one in (model, lean):
        handles += [
            one.key.register_forward_hook(doubled),
            one.value.register_forward_pre_hook(halved),
            one.query.register_full_backward_hook(lambda *_: calls.append("backward") and None),
        ]
    for _ in range(3):
        pairs = zip(gradients(model, x), gradients(lean, x.double()), strict=True)
        for got, exact in pairs:
            assert relative_error(got, exact) < 4 * TOLERANCE[BF16]
    assert [calls.count(name) for name in ("pre", "forward", "backward")] == [6, 6, 6]


def test_a_forward_that_is_replaced_is_called(model, x):
    model(x)
    model(x)
    model.key.forward = lambda x: torch.zeros_like(x)
    with torch.no_grad():
        y = model(x)
        v = plain(model).value(x.double()).mean(1, keepdim=True).expand(-1, 7, -1)
        want = plain(model).last(v)
    assert relative_error(y, want) < 3 * TOLERANCE[BF16]
    del model.key.forward
    check(model, x)


def test_coefficients_that_change_between_the_layers(model, x):
    model(x)
    model(x)

    def other(*_) -> None:
        with torch.no_grad():
            model.value.delta.mul_(-1.0)

    model.key.register_forward_pre_hook(other)
    with torch.no_grad():
        for _ in range(3):
            y = model(x)  # key has turned value's by now
            change_free = plain(model)
            change_free.key._forward_pre_hooks.clear()
            assert relative_error(y, change_free(x.double())) < 3 * TOLERANCE[BF16]


@pytest.mark.parametrize("used", [("query",), ("value",), ("query", "value"), ("key", "value")])
def test_outputs_that_lead_to_no_loss(model, x, used):
    model(x)
    model(x)
    assert groups(model)
    found = {}
    handles = [
        getattr(model, name).register_forward_hook(
            lambda module, args, y, name=name: found.__setitem__(name, y)
        )
        for name in NAMES[:3]
    ]
    leaf = x.clone().requires_grad_()
    model(leaf)
    loss = sum(found[name].float().square().sum() for name in used)
    loss.backward()
    exact = x.double().requires_grad_()
    lean = plain(model)
    sum(getattr(lean, name)(exact).square().sum() for name in used).backward()
    assert relative_error(leaf.grad, exact.grad) < 3 * TOLERANCE[BF16]
    for name in NAMES[:3]:
        got, want = getattr(model, name).delta.grad, getattr(lean, name).delta.grad
        assert (got is None) == (want is None) == (name not in used)
        assert want is None or relative_error(got, want) < 3 * TOLERANCE[BF16]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("frozen", [("query",), ("key", "value"), NAMES[:3]])
def test_coefficients_that_are_not_trained(model, x, frozen):
    model(x)
    for name in frozen:
        getattr(model, name).delta.requires_grad_(False)
    lean = plain(model)
    for _ in range(3):
        model.zero_grad()
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        model(leaf).float().sum().backward()
        lean.zero_grad()
        lean(exact).sum().backward()
        assert relative_error(leaf.grad, exact.grad) < 5 * TOLERANCE[BF16]
        for name in NAMES[:3]:
            got, want = getattr(model, name).delta.grad, getattr(lean, name).delta.grad
            assert (got is None) == (name in frozen)
            assert got is None or relative_error(got, want) < 5 * TOLERANCE[BF16]


def test_no_gradient_of_x(model, x):
    model(x)
    model(x)
    assert groups(model)
    model.zero_grad()
    model(x).float().sum().backward()
    lean = plain(model)
    lean(x.double()).sum().backward()
    for name in NAMES[:3]:
        got, want = getattr(model, name).delta.grad, getattr(lean, name).delta.grad
        assert relative_error(got, want) < 5 * TOLERANCE[BF16]


def test_a_second_backward(x):
    model = adapted()
    model(x)
    model(x)
    assert groups(model)
    found = []
    for one, rows in ((model, x), (plain(model), x.double())):
        leaf = rows.clone().requires_grad_()
        (dx,) = torch.autograd.grad(one(leaf).sum(), leaf, create_graph=True)
        dx.square().sum().backward()
        found.append([leaf.grad, *(layer.delta.grad for _, layer in spectral_layers(one))])
    for got, exact in zip(*found, strict=True):
        assert relative_error(got, exact) < 10 * TOLERANCE[BF16]


def test_checkpoints_save_the_same_when_they_compute_again(model, x):
    model(x)
    model(x)
    assert groups(model)
    model.checkpointed = True
    check(model, x)
    fresh = adapted()
    fresh.checkpointed = True
    check(fresh, x)
    check(fresh, x)
    assert not groups(fresh)


def test_what_is_saved_does_not_hold_the_outputs(model, x):
    """p of all three, 24 columns, and its memory is no larger."""
    matrix = torch.zeros(88 + 24, 56, dtype=BF16)
    deltas = [torch.zeros(RANK, requires_grad=True) for _ in range(3)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outs, ranks = [32, 32, 24], [8, 8, 8]
        ys = torch.ops.fastspec.shared_input(x, matrix, None, outs, ranks, deltas)
    (p,) = [t for t in saved if t.shape == (21, 24)]
    assert p.untyped_storage().nbytes() == 21 * 24 * 2
    assert len(saved) == 5
    assert [y.shape[-1] for y in ys] == outs


@pytest.mark.parametrize("core", ["dense", "band"])
def test_other_cores_compute_apart(core, x):
    model = adapted(core=core)
    for _ in range(3):
        check(model, x)
    assert not groups(model)


def test_copies_and_moves(model, x):
    model(x)
    model(x)
    assert groups(model)
    other = copy.deepcopy(model)
    for layer in (other.query, other.key):
        layer.delta.data.mul_(-2.0)
    for _ in range(2):
        check(other, x)
    assert groups(other)
    check(model, x)
    model.to(torch.float16)
    for _ in range(2):
        check(model, x.half())
    assert groups(model)
    model.query.bias.requires_grad_(True)
    for _ in range(3):
        check(model, x.half())
    fastspec.merge(model)
    merged = model(x.half())
    fastspec.unmerge(model)
    for _ in range(2):
        check(model, x.half())
    assert relative_error(merged, plain(model)(x.double())) < 3 * TOLERANCE[BF16]
    fastspec.keep_merged(model, False)
    assert model not in together._known
    assert all(layer._kept is None for _, layer in spectral_layers(model))


def test_a_layer_that_is_put_in_anothers_place(model, x):
    model(x)
    model(x)
    model.key = copy.deepcopy(model.value)
    model.key.weight = nn.Parameter(torch.randn(32, 32).to(BF16), requires_grad=False)
    model.key.bias = None
    model.key.refactorize()
    for _ in range(3):
        check(model, x)


def test_an_x_of_another_kind_is_refused_as_by_a_layer(model, x):
    model(x)
    model(x)
    with pytest.raises(TypeError, match="x must have the weight's dtype"):
        model(x.float())
    with pytest.raises(ValueError, match="x must be"):
        model(x[..., :8])
    check(model, x)
    assert model(x[:0]).shape == (0, 7, 16)
    with torch.autocast("cpu", BF16):
        y = model(x)
    assert relative_error(y, plain(model)(x.double())) < 3 * TOLERANCE[BF16]
    check(model, x)


def test_an_error_on_the_way_forgets_nothing(model, x):
    model(x)
    model(x)

    def stop(*_) -> None:
        raise RuntimeError("here")

    change = model.key.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="here"):
        model(x)
    change.remove()
    assert groups(model)
    check(model, x)
    assert counted(model, x) == 1


def test_memory_of_x_is_not_held(x):
    import weakref

    model = adapted()
    model(x)
    rows = x.clone()
    gone = weakref.ref(rows)

    def forget(module, args, y):
        return y

    model.value.register_forward_hook(forget)
    with torch.no_grad(), contextlib.ExitStack():
        model(rows)
    del rows
    assert gone() is None
    assert not together._under_way.forwards


def test_the_formula_of_the_copies(model, x):
    """Every copy in the matrix is W + U C Vh, and what surrounds them is as it was laid."""
    model(x)
    model(x)
    (group,) = groups(model).values()
    for at, name in enumerate(NAMES[:3]):
        layer = getattr(model, name)
        parts = [t.detach().double() for t in (layer.weight, layer.u, layer.vh, layer.delta)]
        assert relative_error(layer._kept.effective, reference.effective_weight(*parts)) < 1e-2
        row, below, beside = 32 * at, 88 + 8 * at, 32 + 8 * at
        rows = group.matrix[row : row + group.outs[at]]
        assert torch.equal(rows[:, :32], layer._kept.effective)
        assert torch.equal(rows[:, beside : beside + RANK], layer.u)
        assert rows[:, 32:].count_nonzero() == layer.u.count_nonzero()
        assert torch.equal(group.matrix[below : below + RANK, :32], layer.vh)
        assert torch.equal(group.bias[row : row + group.outs[at]], layer.bias)
    assert not group.bias[88:].any()


def test_outputs_are_written_to_without_harm(model, x):
    """Each by itself: as with outputs of three layers."""
    model(x)
    model(x)
    assert groups(model)
    lean = plain(model)
    for one in (model, lean):
        for name, factor in (("query", 2.0), ("key", -1.0), ("value", 0.5)):
            getattr(one, name).register_forward_hook(
                lambda module, args, y, factor=factor: y.mul_(factor)
            )
    for _ in range(2):
        for got, exact in zip(gradients(model, x), gradients(lean, x.double()), strict=True):
            assert relative_error(got, exact) < 4 * TOLERANCE[BF16]
    with torch.no_grad():
        assert relative_error(model(x), lean(x.double())) < 4 * TOLERANCE[BF16]


def test_layers_that_are_shared_by_two_models(model, x):
    """Each model's forward has what it computed; the layers' copies are where they are."""
    model(x)
    model(x)
    other = Model().to(BF16)
    for name in NAMES:
        setattr(other, name, getattr(model, name))
    fastspec.keep_merged(other)
    for _ in range(3):
        check(model, x)
        with torch.no_grad():
            exact = plain(model)(x.double())
            assert relative_error(other(x), exact) < 3 * TOLERANCE[BF16]


def test_what_a_graph_was_captured_with_is_not_given_up(model, x, monkeypatch):
    """Another way through the model, or other coefficients, must not free what replays read and write."""
    import gc
    import weakref

    model(x)
    model(x)
    with monkeypatch.context() as patch:
        patch.setattr(together, "capturing", lambda t: True)
        patch.setattr("fastspec.nn.kept_weight.together.capturing", lambda t: True)
        model(x)
    (group,) = groups(model).values()
    matrix, last = weakref.ref(group.matrix), weakref.ref(model.last._kept)
    tables = weakref.ref(together._known[model].captured[0])
    del group
    model.before_key = lambda x: x * 1
    for _ in range(3):
        check(model, x)
        model.last.delta = nn.Parameter(torch.randn(RANK))
    gc.collect()
    assert id(model.query) not in groups(model)
    assert None not in (matrix(), last(), tables())
