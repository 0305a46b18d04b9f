"""The cost model: what the chosen plan must be where the answer is clear, and what it may never be."""

import itertools

import pytest
import torch

from fastspec import SpectralLinear
from fastspec.cores import CORES
from fastspec.ops.plan import Plan, make_plan


def test_many_rows_merge_and_few_rows_do_not():
    assert make_plan(4096, 768, 3072, 32).forward == "merged"
    for n in (1, 4, 16):
        assert make_plan(n, 768, 768, 32, needs_dx=False, needs_delta=False) == Plan(
            "factored", "none"
        )


def test_rectangles_take_the_short_side_and_squares_cannot():
    assert make_plan(4096, 768, 3072, 32).gradient == "short"
    assert make_plan(4096, 3072, 768, 32).gradient == "short"
    assert make_plan(4096, 768, 768, 32).gradient == "two_sided"


def test_a_complete_basis_replaces_the_weight_on_rectangles():
    for core in ("diag", "band"):
        assert make_plan(4096, 768, 3072, 768, core=core) == Plan("spectral", "two_sided")
    assert make_plan(4096, 768, 3072, 767).forward != "spectral"
    assert make_plan(4096, 768, 3072, 768, singular_basis=False).forward != "spectral"


def test_high_rank_takes_the_dense_route_on_squares():
    assert make_plan(4096, 768, 768, 768).gradient == "dense"
    assert make_plan(4096, 768, 768, 768, core="band").gradient == "dense"


def test_a_merged_copy_is_saved_only_beside_an_input_twice_as_large():
    assert make_plan(4096, 768, 768, 768) == Plan("saved", "dense")
    assert make_plan(1024, 768, 768, 768).forward != "saved"
    assert make_plan(4096, 768, 768, 32).forward == "merged"


@pytest.mark.parametrize("core", CORES)
def test_what_no_plan_may_do(core):
    for n, (i, o), k, dtype, device, dx, delta, singular in itertools.product(
        (1, 64, 4096), ((96, 96), (96, 384), (384, 96)), (1, 32, 96),
        (torch.float32, torch.bfloat16, torch.float64), ("cpu", "cuda"),
        (True, False), (True, False), (True, False),
    ):  # fmt: skip
        plan = make_plan(
            n, i, o, k, core=core, dtype=dtype, device=device,
            needs_dx=dx, needs_delta=delta, singular_basis=singular,
        )  # fmt: skip
        assert (plan.gradient == "none") == (not delta)
        if plan.forward == "spectral":
            assert singular
            assert k == min(i, o)
            assert device == "cpu"
        if plan.gradient == "short":
            assert singular
            assert core != "band"
            assert device == "cpu"
            assert dtype != torch.bfloat16
            assert dx or o < i
        if dtype == torch.bfloat16:
            assert plan.forward == "factored", "a merged 16-bit weight rounds the coefficients away"


def test_plans_are_data():
    layer = SpectralLinear(16, 64, rank=4)
    plan = layer.plan(4096)
    assert str(plan) == f"{plan.forward}/{plan.gradient}"
    layer.forced_plan = Plan("factored", "two_sided")
    assert layer.plan(1) == Plan("factored", "two_sided")
    with pytest.raises(ValueError, match="forward must be one of"):
        Plan("quick", "none")
    with pytest.raises(ValueError, match="gradient must be one of"):
        Plan("merged", "both")
