"""Kept copies of a whole model, made again as its forward begins (fastspec/nn/together.py)."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from support import TOLERANCE, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastspec
from fastspec.model.targets import spectral_layers
from fastspec.nn import kept_weight, together
from fastspec.ops import reference

BF16 = torch.bfloat16
WIDTH = 16


class Model(nn.Module):
    """Layers of two kinds; `order` names them as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.order = ["a", "up", "down", "b"]
        self.checkpointed = False

    def run(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = torch.tanh(getattr(self, name)(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = fastspec.SpectralConfig(
        rank=5, target_modules=["a", "b", "up", "down"], modules_to_save=[]
    )
    found = fastspec.spectralize(Model().to(BF16), config)
    shift(found)
    return fastspec.keep_merged(found)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1)).to(BF16)


@pytest.fixture
def alone(monkeypatch) -> list[int]:
    """An entry for every layer that compared for itself."""
    seen: list[int] = []
    one = kept_weight.keep_merged
    monkeypatch.setattr(kept_weight, "keep_merged", lambda *a: seen.append(1) or one(*a))
    return seen


def shift(model: nn.Module, seed: int = 0) -> None:
    """Other coefficients, written past the version counters as a fused optimiser does."""
    gen = torch.Generator().manual_seed(seed)
    for _, layer in spectral_layers(model):
        layer.delta.data.copy_(torch.randn(layer.delta.shape, generator=gen))


def hooks(model: nn.Module) -> list:
    """The model's hooks that are of copies."""
    found = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    return [hook for hook in found if hook in (together._before, together._after)]


def check(model: nn.Module, x: Tensor, y: Tensor | None = None, copies: bool = True) -> None:
    """y is that of the coefficients as they are, and so is every copy that was used."""
    y = model(x) if y is None else y
    exact = x.double()
    for name in model.order:
        layer = getattr(model, name)
        parts = [t.detach().double() for t in (layer.weight, layer.u, layer.vh, layer.delta)]
        exact = torch.tanh(exact @ reference.effective_weight(*parts).mT + layer.bias.double())
        if copies:
            assert relative_error(layer._kept.effective, reference.effective_weight(*parts)) < 1e-2
    assert relative_error(y, exact) < 3 * TOLERANCE[BF16]


def test_after_the_first_forward_no_layer_compares_for_itself(model, x, alone):
    check(model, x)
    assert len(alone) == 4
    for seed in range(3):
        shift(model, seed)
        check(model, x)
        with torch.inference_mode():
            check(model, x)
    assert len(alone) == 4


def test_all_layers_of_a_forward_are_kept_in_one_call(model, x, monkeypatch):
    made = []
    one = together.keep_together
    monkeypatch.setattr(together, "keep_together", lambda ops: made.append(len(ops)) or one(ops))
    for _ in range(3):
        model(x)
    assert made == [4]  # once for all: nothing has moved
    model.a.delta = nn.Parameter(torch.ones_like(model.a.delta))
    for _ in range(3):
        check(model, x)
    assert made == [4, 3, 4]  # the one that changed compared for itself once


@pytest.mark.parametrize("fused", [True, False])
def test_training(model, x, alone, fused):
    lean = fastspec.keep_merged(copy.deepcopy(model), False)
    losses = []
    for one in (model, lean):
        optimizer = torch.optim.AdamW(
            [p for p in one.parameters() if p.requires_grad], lr=1e-2, fused=fused
        )
        losses.append([])
        for _ in range(5):
            loss = (one(x).float() - 0.3).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert len(alone) == 4  # a copy that nobody holds is written anew where it is
    torch.testing.assert_close(*losses, rtol=3e-2, atol=3e-3)
    assert losses[0][-1] < losses[0][0]


def test_coefficients_that_change_after_the_forward_began(model, x, alone):
    """With a version: by a hook, and in the forward of a layer before."""

    def other(*_) -> None:
        nn.init.normal_(model.down.delta)

    model(x)
    for owner in (model, model.up):
        change = owner.register_forward_pre_hook(other)
        check(model, x)
        change.remove()
    assert len(alone) == 4 + 2


def test_a_layer_called_twice_compares_the_second_time(model, x, alone):
    model.order = ["a", "b", "a"]
    model(x)
    assert len(alone) == 3
    model(x)
    assert len(alone) == 4
    change = model.b.register_forward_pre_hook(lambda *_: shift(model, 3))  # past the versions
    y = model(x)
    change.remove()
    assert len(alone) == 5
    w = [model.a._kept.effective.clone()]
    model.order = ["a"]
    check(model, x)
    assert torch.equal(w[0], model.a._kept.effective)
    assert y.isfinite().all()


def test_a_layer_called_on_its_own_compares(model, x, alone):
    model(x)
    shift(model, 5)
    y = model.a(x)
    assert len(alone) == 5
    layer = model.a
    parts = [t.detach().double() for t in (layer.weight, layer.u, layer.vh, layer.delta)]
    exact = x.double() @ reference.effective_weight(*parts).mT + layer.bias.double()
    assert relative_error(y, exact) < TOLERANCE[BF16]


def test_a_checkpoint_computed_again_compares(model, x, alone):
    model.checkpointed = True
    model(x)
    shift(model, 2)
    y = model(x)
    assert len(alone) == 4
    y.sum().backward()
    assert len(alone) == 8
    got = [layer.delta.grad.clone() for _, layer in spectral_layers(model)]
    model.zero_grad()
    model.checkpointed = False
    model(x).sum().backward()
    for one, (_, layer) in zip(got, spectral_layers(model), strict=True):
        assert torch.equal(one, layer.delta.grad)


def test_another_thread_trusts_nothing(model, x, alone):
    model(x)
    inside, answered = [], []
    hook = model.up.register_forward_hook(lambda *_: inside.append(1) and None)

    def other() -> None:
        answered.append(model.a(x))

    def begin(*_) -> None:
        if threading.current_thread() is threading.main_thread():
            started.start()

    change = model.a.register_forward_pre_hook(begin)
    started = threading.Thread(target=other)
    model(x)
    started.join()
    hook.remove()
    change.remove()
    assert inside
    assert len(answered) == 1
    assert len(alone) == 5


def test_a_forward_that_fails_leaves_no_trust(model, x, alone):
    model(x)
    with pytest.raises(ValueError, match="x must be"):
        model(x[:, :3])
    shift(model, 4)
    model.up(x)
    assert len(alone) == 5
    assert not together._under_way.forwards
    stop = model.b.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # no hook hears of it
        model(x)
    stop.remove()
    check(model, x)
    assert not together._under_way.forwards


def test_a_backward_never_takes_a_copy_of_other_coefficients(model, x):
    """As for any parameter that is written to between a forward and its backward, PyTorch refuses."""
    model(x)
    y = model(x.clone().requires_grad_())
    for _, layer in spectral_layers(model):
        with torch.no_grad():
            layer.delta.mul_(2.0)  # counted
    check(model, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_graph_keeps_the_copies_of_coefficients_that_were_replaced(model, x):
    model(x)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    (want,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
    for _, layer in spectral_layers(model):
        layer.delta = nn.Parameter(2 * layer.delta.detach())
    check(model, x)
    (got,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(got, want)


def test_copies_stay_where_they_are(model, x):
    model(x)
    kept = [layer._kept for _, layer in spectral_layers(model)]
    places = [k.room.effective.data_ptr() for k in kept]
    for seed in range(20):
        shift(model, seed)
        with torch.no_grad():
            for _, layer in spectral_layers(model):
                layer.delta.add_(1.0)
        model(x).sum().backward()
    again = [layer._kept.room.effective.data_ptr() for _, layer in spectral_layers(model)]
    assert again == places


def test_copies_and_pickles_keep_for_themselves(model, x, alone):
    model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    others = [copy.deepcopy(model), torch.load(stream, weights_only=False)]
    for seed, other in enumerate(others):
        assert all(layer._kept is None for _, layer in spectral_layers(other))
        shift(other, seed + 6)
        before = len(alone)
        for _ in range(2):
            check(other, x)
        assert len(alone) == before + 4
        fastspec.keep_merged(other, False)
        assert not hooks(other)
        assert other._forward_hooks_always_called.keys() <= other._forward_hooks.keys()
    check(model, x)


def test_off_and_on(model, x, alone):
    model(x)
    fastspec.keep_merged(model)  # twice is once
    assert hooks(model) == [together._before, together._after]
    others = dict(model._forward_pre_hooks), dict(model._forward_hooks)
    own = model.register_forward_pre_hook(lambda *_: None)
    fastspec.keep_merged(model, False)
    assert hooks(model) == []
    assert own.id in model._forward_pre_hooks
    assert len(model._forward_pre_hooks) == len(others[0])
    assert len(model._forward_hooks) == len(others[1]) - 1
    before = len(alone)
    model(x)
    assert len(alone) == before
    assert all(layer._kept is None for _, layer in spectral_layers(model))


def test_moved_models_keep_again(model, x, alone):
    model(x)
    model.to(torch.float16)
    check_in = model.double()
    assert check_in(x.double()).dtype == torch.float64
    model.to(BF16)
    before = len(alone)
    for _ in range(2):
        check(model, x)
    assert len(alone) == before + 4


def test_merged_layers_are_left_alone(model, x, alone):
    model(x)
    fastspec.merge(model)
    y = model(x)
    shift(model, 8)
    assert torch.equal(model(x), y)
    fastspec.unmerge(model)
    check(model, x)
    assert len(alone) == 4


def test_other_parameters_in_the_layers_places(model, x):
    """torch.func: the copies are those of the parameters that are given."""
    model(x)
    given = {name: 2 * p.detach() for name, p in model.named_parameters() if "delta" in name}
    got = torch.func.functional_call(model, given, (x,))
    check(model, x)
    for name, value in given.items():
        model.get_parameter(name).data.copy_(value)
    check(model, x, got, copies=False)


def test_compiled_it_has_no_effect(model, x, alone):
    model(x)
    before = len(alone)
    shift(model, 9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    y = compiled(x)
    assert len(alone) == before
    lean = fastspec.keep_merged(copy.deepcopy(model), False)
    assert relative_error(y, lean(x).double()) < 1e-2
    assert not together._under_way.forwards


def test_under_autocast_it_has_no_effect(model, x, alone):
    model(x)
    shift(model, 9)
    before = [layer._kept.effective.clone() for _, layer in spectral_layers(model)]
    with torch.autocast("cpu", BF16):
        model(x)
    after = [layer._kept.effective for _, layer in spectral_layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    check(model, x)


def test_a_model_within_a_model(model, x, alone):
    outer = fastspec.keep_merged(nn.Sequential(model))
    for seed in range(3):
        shift(model, seed)
        check(model, x, outer(x))
    assert len(alone) == 4


def test_factors_that_are_made_again(model, x):
    model(x)
    model.a.weight.data.mul_(1.5)
    model.a.refactorize()
    check(model, x)
    with torch.no_grad():
        model.b.u.mul_(-1.0)
    check(model, x)


def test_what_was_dropped_is_held_no_more(model, x):
    import gc
    import weakref

    model(x)
    model(x)
    gone = weakref.ref(model.a)
    model.a = copy.deepcopy(model.b)
    for _ in range(2):
        check(model, x)
    gc.collect()
    assert gone() is None
    whole = weakref.ref(model)
    del model
    gc.collect()
    assert len([m for m in together._known if m is whole()]) <= 1


def test_several_forwards_before_their_backwards(model, x):
    """Nothing has changed between them: each has the gradients that it has by itself."""
    model(x)
    model(x).sum().backward()
    want = [layer.delta.grad.clone() for _, layer in spectral_layers(model)]
    model.zero_grad()
    outputs = [model(x) for _ in range(3)]
    outputs += [model.run(x)]  # each layer compares for itself
    for y in outputs:
        model.zero_grad()
        y.sum().backward()
        got = [layer.delta.grad for _, layer in spectral_layers(model)]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
