"""Many runs side by side: the correlation of subspace overlap and score."""

import pytest
import torch
from matrices import matrix

from fastspec.studies.analyze.alignment import align
from fastspec.studies.analyze.stability import RunAlignment, generalisation, holm, within_groups
from fastspec.studies.analyze.weights import Pair


def alignments(amount, seed):
    """Two matrices: one moved by `amount` of the same noise every time, one by noise of its own."""
    w, _, _ = matrix(torch.linspace(8, 1, 20), 30, 20)

    def noise(seed):
        g = torch.Generator().manual_seed(seed)
        return torch.randn(30, 20, generator=g, dtype=torch.float64)

    moved = {"query": w + amount * noise(100), "key": w + 0.1 * noise(seed)}
    return align([Pair(f"layer.0.{n}.weight", "attention", 0, w, x) for n, x in moved.items()])


def some_runs(task, base, labels="true", start="pretrained", runs=4):
    for i in range(runs):
        fields = (f"r{i}", "full", task, start, labels, 1e-3, i, base - 3 * i)
        yield RunAlignment(*fields, alignments(0.02 * (i + 1), i))


def test_generalisation_finds_the_matrix_that_goes_with_the_score():
    runs = [*some_runs("rte", 60.0), *some_runs("cola", 20.0)]
    first, second = generalisation(runs)
    assert first.matrix == "layer.0.query"
    assert first.rho > 0.9
    assert first.p <= first.p_fdr <= first.p_holm < 0.05
    assert second.p_fdr > 0.05
    with pytest.raises(ValueError, match="over 4 runs says nothing"):
        generalisation(runs[:4])
    assert {"task", "best dev score", "attention: cosine, leading tenth"} <= set(runs[0].summary())


@pytest.mark.parametrize("odd", [{"labels": "random"}, {"start": "random"}])
def test_generalisation_compares_like_with_like(odd):
    # centred by task alone, the low scores of these equally stable runs would hide the correlation
    groups = [*some_runs("rte", 60.0), *some_runs("rte", 10.0, **odd)]
    first, _ = generalisation(groups)
    assert first.rho == pytest.approx(
        generalisation(groups[:4] + list(some_runs("cola", 1)))[0].rho
    )
    # a run without its like says nothing
    lonely = next(some_runs("cola", 5.0))
    assert generalisation([*groups, lonely]) == generalisation(groups)
    with pytest.raises(ValueError, match=r"over 4 runs .* shares task, labels and start"):
        generalisation([*groups[:4], lonely])
    values = torch.tensor([1.0, 3.0, 10.0, 30.0])
    centred = within_groups([*groups[:2], *groups[4:6]], values)
    assert centred.tolist() == [-1.0, 1.0, -10.0, 10.0]


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
