"""The cost model: what the chosen plan must be where the answer is clear, and what it may never be."""

import itertools
from dataclasses import replace

import pytest
import torch

from fastspec import SpectralLinear
from fastspec.cores import CORES
from fastspec.ops.plan import LayerCall, Plan, legal_plans, make_plan, weighed_plans, why_not


def planned(*sizes, **needs):
    """The plan of n rows, in, out, k."""
    return make_plan(LayerCall(*sizes, **needs))


def test_many_rows_merge_and_few_rows_do_not():
    assert planned(4096, 768, 3072, 32).forward == "merged"
    for n in (1, 4, 16):
        assert planned(n, 768, 768, 32, needs_dx=False, needs_delta=False) == Plan(
            "factored", "none"
        )


def test_rectangles_take_the_short_side_and_squares_cannot():
    assert planned(4096, 768, 3072, 32).gradient == "short"
    assert planned(4096, 3072, 768, 32).gradient == "short"
    assert planned(4096, 768, 768, 32).gradient == "two_sided"


def test_a_complete_basis_replaces_the_weight_on_rectangles():
    for core in ("diag", "band"):
        assert planned(4096, 768, 3072, 768, core=core) == Plan("spectral", "two_sided")
    assert planned(4096, 768, 3072, 767).forward != "spectral"
    assert planned(4096, 768, 3072, 768, singular_basis=False).forward != "spectral"


def test_high_rank_takes_the_dense_route_on_squares():
    assert planned(4096, 768, 768, 768).gradient == "dense"
    assert planned(4096, 768, 768, 768, core="band").gradient == "dense"


def test_a_merged_copy_is_saved_only_beside_an_input_twice_as_large():
    assert planned(4096, 768, 768, 768) == Plan("saved", "dense")
    assert planned(1024, 768, 768, 768).forward != "saved"
    assert planned(4096, 768, 768, 32).forward == "merged"


@pytest.mark.parametrize("core", CORES)
def test_what_no_plan_may_do(core):
    for n, (i, o), k, dtype, device, dx, delta, singular in itertools.product(
        (1, 64, 4096), ((96, 96), (96, 384), (384, 96)), (1, 32, 96),
        (torch.float32, torch.bfloat16, torch.float64), ("cpu", "cuda"),
        (True, False), (True, False), (True, False),
    ):  # fmt: skip
        call = LayerCall(n, i, o, k, core, dtype, device, dx, delta, singular)
        plan = make_plan(call)
        assert plan in weighed_plans(call)
        assert plan in legal_plans(call)
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


CALL = LayerCall(2048, 96, 384, 32)


@pytest.mark.parametrize(
    ("plan", "call", "reason"),
    [
        (Plan("merged", "none"), CALL, "delta requires a gradient"),
        (Plan("resident", "dense"), CALL, "give `effective` instead"),
        (Plan("merged", "dense"), replace(CALL, resident=True), "only forward='resident'"),
        (Plan("saved", "short"), CALL, "only beside gradient='dense'"),
        (Plan("merged", "short"), replace(CALL, singular_basis=False), "singular_basis=False"),
        (Plan("merged", "short"), replace(CALL, core="band"), "core='band'"),
        (Plan("merged", "short"), replace(CALL, dtype=torch.float16), "torch.float16"),
        (Plan("spectral", "two_sided"), CALL, "k=32 of 96"),
        (Plan("spectral", "two_sided"), replace(CALL, k=96, singular_basis=False), "complete"),
        (Plan("spectral", "two_sided"), replace(CALL, k=96, dtype=torch.bfloat16), "bfloat16"),
        (Plan("spectral", "two_sided"), replace(CALL, k=96, device="cuda"), "cuda"),
        (Plan("spectral", "short"), replace(CALL, k=96), "must be 'two_sided'"),
    ],
    ids=lambda value: str(value) if isinstance(value, Plan) else "",
)
def test_an_illegal_plan_has_its_reason(plan, call, reason):
    assert reason in why_not(plan, call)
    assert plan not in legal_plans(call)


def test_a_forced_plan_that_is_refused_says_so_in_print():
    layer = SpectralLinear(16, 64, rank=4)
    layer.forced_plan = Plan("spectral", "two_sided")
    with pytest.raises(ValueError, match=r"plan spectral/two_sided is refused: .*k=4 of 16"):
        layer(torch.randn(2, 16))
    assert "plan=spectral/two_sided at 2048 rows, refused: forward='spectral' needs" in repr(layer)
    layer.forced_plan = Plan("factored", "short")
    assert repr(layer).endswith("plan=factored/short at 2048 rows)")


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
