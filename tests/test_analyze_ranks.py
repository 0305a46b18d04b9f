"""Ranks by gradient energy."""

from types import SimpleNamespace

import pytest
import torch

import fastspec
from fastspec import SpectralConfig
from fastspec.model.targets import spectral_layers
from fastspec.studies.analyze.ranks import allocate, coefficient_energy, patterns


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x, y):
        return SimpleNamespace(loss=(self.b(torch.tanh(self.a(x))) - y).square().mean())


def test_the_energy_of_a_whole_dense_core_is_that_of_the_weight():
    model = TwoLayers()
    batches = [dict(zip("xy", torch.randn(2, 5, 8), strict=True)) for _ in range(3)]
    before = {n: w.clone() for n, w in model.state_dict().items()}
    energy = coefficient_energy(model, SpectralConfig(rank="full", core="dense"), batches)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    for name in ("a", "b"):
        weight = model.get_submodule(name).weight
        gradients = [torch.autograd.grad(model(**batch).loss, weight)[0] for batch in batches]
        assert energy[name] == pytest.approx(sum(g.square().sum().item() for g in gradients), 1e-4)


@pytest.mark.parametrize(
    ("core", "rank", "energy", "expected"),
    [
        ("dense", 4, (3.0, 1.0), (4, 2)),  # of 32 numbers 24 and 8
        ("diag", 4, (3.0, 1.0), (6, 2)),
        ("band", 4, (3.0, 1.0), (6, 2)),
        ("diag", 8, (3.0, 1.0), (8, 4)),  # no more than there are
        ("dense", 4, (1.0, 0.0), (5, 0)),
    ],
)
def test_ranks_go_by_energy(core, rank, energy, expected):
    model, config = TwoLayers(), SpectralConfig(rank=rank, core=core)
    ranks = allocate(model, config, dict(zip("ab", energy, strict=True)))
    assert ranks == dict(zip("ab", expected, strict=True))
    adapted = fastspec.spectralize(model, SpectralConfig(rank=patterns(ranks), core=core))
    found = {n: layer.directions.rank for n, layer in spectral_layers(adapted)}
    assert found == {n: k for n, k in ranks.items() if k}
