"""Whose rows are where in a layer's input: found out by marked rows, never by the count alone."""

import pytest
import torch
from support import assert_close
from tasks_support import alone, random_values
from tiny_models import net
from torch import nn

import fastspec
from fastspec import SpectralConfig, spectralize
from fastspec.multitask.probe import codes

NAMES = ["b", None, "a", "c", "a"]
SQUARE = torch.arange(25).reshape(5, 5) * 7 % 11  # as many tokens as rows


class Around(nn.Module):
    """A layer whose input is changed on the way in and changed back on the way out."""

    def __init__(self, layer, there, back):
        super().__init__()
        self.layer, self.there, self.back = layer, there, back

    def forward(self, x):
        return self.back(self.layer(self.there(x)), x)


def first(x):
    return x.transpose(0, 1)


KNOWN = {
    "time first": (first, lambda y, x: first(y)),
    "flattened": (lambda x: x.flatten(0, 1), lambda y, x: y.view(*x.shape[:2], -1)),
    "flattened, time first": (
        lambda x: first(x).flatten(0, 1),
        lambda y, x: first(y.view(x.shape[1], x.shape[0], -1)),
    ),
    "repeated": (lambda x: x.repeat(3, 1, 1), lambda y, x: y[: len(x)]),
    "expanded, each row": (lambda x: x.repeat_interleave(3, 0), lambda y, x: y[::3]),
}


REFUSED = {
    "routed rows": (
        lambda x: x[x.sum((1, 2)).argsort()],
        lambda y, x: y[x.sum((1, 2)).argsort().argsort()],
    ),
    "reversed rows": (lambda x: x.flip(0), lambda y, x: y.flip(0)),
    "rows that meet": (lambda x: x + x.mean(0), lambda y, x: y),
    "the same for all": (lambda x: torch.ones_like(x), lambda y, x: y),
    "one for all": (lambda x: torch.ones(1, *x.shape[1:]), lambda y, x: y.expand(len(x), -1, -1)),
    "as many as values say": (
        lambda x: x[: 1 + int(x[:, 0, 0].gt(0).sum())],
        lambda y, x: torch.cat([y, y[:1].expand(len(x) - len(y), -1, -1)]),
    ),
}


def with_tasks(change, where="up"):
    model = net()
    if where == "head":
        model.head = Around(model.head, *change)
    else:
        model.blocks[0].up = Around(model.blocks[0].up, *change)
    heads = ["head"] if where == "head" else None
    model = spectralize(
        model, SpectralConfig(rank=4, **({"modules_to_save": heads} if heads else {}))
    )
    for seed, name in enumerate("abc"):
        bank = fastspec.task_bank(model)
        fastspec.add_task(model, name, random_values(bank, seed))
    return model


@pytest.mark.parametrize("where", ["up", "head"])
class TestChangedInputs:
    @pytest.mark.parametrize("change", KNOWN)
    def test_rows_are_found(self, change, where):
        model = with_tasks(KNOWN[change], where)
        with torch.no_grad():
            for ids in (SQUARE, SQUARE[:, :3], SQUARE[:, :1]):
                assert_close(model(ids, tasks=NAMES), alone(model, NAMES, ids))
            assert_close(model(SQUARE[:2], tasks=["c", "a"]), alone(model, ["c", "a"], SQUARE[:2]))

    @pytest.mark.parametrize("change", REFUSED)
    def test_or_refused_before_anything_is_computed(self, change, where):
        model = with_tasks(REFUSED[change], where)
        layer = "blocks.0.up.layer" if where == "up" else "head.layer"
        with torch.no_grad():
            with pytest.raises(ValueError, match=rf"{layer}: whose rows.*can't be told"):
                model(SQUARE, tasks=NAMES)
            assert torch.equal(model(SQUARE), with_tasks(REFUSED[change], where)(SQUARE))
            # of one task it does not matter whose they are
            mixed = model(SQUARE, tasks=["a"] * 5)
            fastspec.set_task(model, "a")
            assert_close(mixed, model(SQUARE))

    def test_equal_rows_are_told_apart(self, where):
        """One text for many tasks, first of all: values alone say nothing then."""
        ids = SQUARE[:1].expand(5, -1).contiguous()
        model = with_tasks(KNOWN["time first"], where)
        with torch.no_grad():
            assert_close(model(ids, tasks=NAMES), alone(model, NAMES, ids))
        with pytest.raises(ValueError, match="can't be told"):
            with_tasks(REFUSED["reversed rows"], where)(ids, tasks=NAMES)


def test_a_batch_without_rows():
    model = with_tasks((lambda x: x, lambda y, x: y))
    assert model(SQUARE[:0], tasks=[]).shape == (0, 5, 3)


def test_a_layer_that_gets_its_rows_in_a_new_way_later_says_so():
    model = with_tasks((lambda x: x, lambda y, x: y))
    around = model.blocks[0].up
    model(SQUARE, tasks=NAMES)
    around.there = lambda x: x.repeat(2, 1, 1)
    with pytest.raises(ValueError, match=r"got \[10, 5, 16\] in a batch of 5 rows.*came as batch"):
        model(SQUARE, tasks=NAMES)


def test_an_input_that_fits_two_known_ways_is_refused():
    model = with_tasks((lambda x: x, lambda y, x: y))
    around = model.blocks[0].up
    with torch.no_grad():
        model(SQUARE[:, :3], tasks=NAMES)
        around.there, around.back = KNOWN["time first"]
        model(SQUARE[:, :1], tasks=NAMES)  # one token a row: probed as another kind of call
        assert around.layer.row_layouts == ("batch", "second")
        with pytest.raises(ValueError, match="batch or second"):
            model(SQUARE, tasks=NAMES)


def test_marking_rows_leaves_the_model_and_its_inputs_as_they_are():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.head = nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.calls = 0

        def forward(self, x, cache):
            cache.append(1)
            return self.head(torch.dropout(self.up(self.norm(x)), 0.1, self.training))

    torch.manual_seed(0)
    model = spectralize(Normed(), SpectralConfig(rank=2))
    bank = fastspec.task_bank(model)
    fastspec.add_task(model, "a", random_values(bank, 0))
    model.eval()
    model.up.train()
    x = torch.randn(4, 6)
    kept, cache, state = x.clone(), [], {n: b.clone() for n, b in model.named_buffers()}
    random = torch.get_rng_state()
    model(x, cache, tasks=["a", None, None, "a"])
    assert cache == [1]
    assert torch.equal(x, kept)
    assert all(torch.equal(b, state[n]) for n, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert [n for n, m in model.named_modules() if m.training] == ["up"]


def test_every_row_is_marked_in_calls_of_its_own():
    for count in (2, 3, 6, 7, 32, 1000):
        table = codes(count)
        assert len(table.unique(dim=1).mT) == count
        assert table.sum(0).unique().numel() == 1, (
            "of one size: the marks of two rows are no third row's"
        )
    assert len(codes(32)) == 7
