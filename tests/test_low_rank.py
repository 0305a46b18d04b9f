"""The low-rank core: what it stands for, what its operator computes and saves, tasks, sums, exports."""

import copy

import pytest
import torch
from ops_support import Backward, check, exact, run
from support import assert_close, singular_problem
from torch import nn

import fastspec
from fastspec import cores
from fastspec.cores import (
    core_matrix,
    delta_shape,
    hashed,
    low_rank_parts,
    low_rank_start,
    low_rank_storage,
    summed,
)
from fastspec.ops import low_rank, reference
from fastspec.ops.functional import task_linear
from fastspec.ops.plan import LayerCall, Plan, legal_plans


def problem(out=24, inside=40, k=6, r=2, n=17, dtype=torch.float32, **kw):
    p = singular_problem(out, inside, k, core="low_rank", n=n, dtype=dtype, **kw)
    delta = torch.randn(delta_shape("low_rank", k, core_rank=r)) / 3
    return p | {"delta": delta.to(p["delta"].dtype)}


def test_what_it_stands_for():
    delta = torch.randn(6, 5, dtype=torch.float64)
    start = low_rank_start(3, 5)
    want = sum(2 * torch.outer(delta[m], delta[3 + m] + start[m]) for m in range(3))
    assert_close(core_matrix(delta, "low_rank"), want)
    assert torch.linalg.matrix_rank(want) == 3
    assert_close(low_rank_storage(*low_rank_parts(delta)), delta)


def test_the_start_is_the_same_for_ever():
    """Adapters hold B as a shift from it."""
    assert hashed(4).tolist() == [0, 1753845952, 3507691905, 1408362973]
    start = low_rank_start(2, 300) * 300**0.5
    first = [-0.9999999997671694, -0.18330183601938188, 0.6333963281940669]
    assert_close(start[0, :3], torch.tensor(first, dtype=torch.float64))
    assert start.abs().max() <= 1
    assert start.mean().abs() < 0.1
    assert (start.square().mean() * 3 - 1).abs() < 0.1
    assert torch.equal(low_rank_start(1, 300), low_rank_start(2, 300)[:1])


def test_a_transform_leaves_nothing_of_its_own_behind(monkeypatch):
    """The start is made once and kept; a tensor of vmap's or of grad's is dead after them."""
    kept: dict = {}
    monkeypatch.setattr(cores, "_starts", kept)
    delta = torch.randn(4, 5)
    torch.func.vmap(torch.func.grad(lambda d: core_matrix(d, "low_rank").sum()))(delta[None])
    assert not kept
    core_matrix(delta, "low_rank")
    assert list(kept) == [(2, 5, delta.device)]


def test_a_zero_core_has_a_gradient():
    p = problem()
    p["delta"] = torch.zeros_like(p["delta"])
    y, _, ddelta, _ = run(p, "low_rank", None)
    assert torch.equal(y, torch.nn.functional.linear(p["x"], p["weight"], p["bias"]))
    assert ddelta[:2].abs().min() > 0
    assert not ddelta[2:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 3, 5])
def test_any_rank_and_dtype(dtype, r):
    for shape in ((24, 40), (40, 24), (24, 24)):
        p = problem(*shape, r=r, dtype=dtype, n=50)
        for plan in legal_plans(LayerCall(50, shape[1], shape[0], 6, "low_rank", dtype)):
            check(run(p, "low_rank", plan), exact(p, "low_rank"), dtype)


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("needs_delta", [True, False])
def test_the_backward_computes_what_is_needed_and_no_more(needs_dx, needs_delta):
    p = problem()
    y, dx, ddelta, dbias = exact(p, "low_rank")
    want = (y, dx if needs_dx else None, ddelta if needs_delta else None, dbias)
    call = LayerCall(17, 40, 24, 6, "low_rank", needs_dx=needs_dx, needs_delta=needs_delta)
    for plan in legal_plans(call):
        with Backward("low_rank_linear_backward") as backward:
            check(run(p, "low_rank", plan, needs_dx, needs_delta), want)
        if needs_dx or needs_delta:
            assert backward.needs == [(needs_dx, needs_delta)], plan
            sizes = (dx.numel() * needs_dx, ddelta.numel() * needs_delta)
            assert backward.computed == [sizes]
        else:
            assert not backward.needs, plan


def test_frozen_coefficients_keep_no_activations():
    p = problem(n=1000)
    sizes = []
    x = p["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        operands = (p["weight"], p["bias"], p["u"], p["vh"], p["delta"])
        low_rank.low_rank_linear(x, *operands, "factored", False)
    assert max(sizes) == p["weight"].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("forward", ["factored", "merged", "resident", "update alone"])
def test_opcheck(forward, several, dtype):
    p = problem(n=6, dtype=dtype)
    weight, bias = p["weight"], p["bias"]
    if forward == "resident":
        left, right = low_rank.update_factors(p["u"], p["vh"], p["delta"])
        weight = weight + left @ right
    elif forward == "update alone":
        forward, weight, bias = "factored", None, None
    if several and forward != "factored":
        return
    x, g, delta = p["x"], p["g"], p["delta"]
    if several:
        x, g, delta = x.view(3, 2, -1), g.view(3, 2, -1), torch.randn(3, *delta.shape)
    op, back = torch.ops.fastspec.low_rank_linear, torch.ops.fastspec.low_rank_linear_backward
    basis = (p["u"], p["vh"])
    x, delta = x.clone().requires_grad_(), delta.clone().requires_grad_()
    torch.library.opcheck(op.default, (x, weight, bias, *basis, delta, forward, True))
    x, delta = x.detach(), delta.detach()
    torch.library.opcheck(op.default, (x, weight, bias, *basis, delta, forward, False))
    _, t, *factors = op(x, weight, bias, *basis, delta, forward, True)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(back.default, (g, x, t, weight, *basis, *factors, forward, *needs))


@pytest.mark.parametrize("plan", [None, *legal_plans(LayerCall(512, 128, 96, 16, "low_rank"))])
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-7])
def test_small_coefficients_cost_float16_no_digits(plan, size):
    """A grows from zero, and gradients are small: their product is below the range."""
    p = problem(96, 128, 16, n=512, dtype=torch.float16)
    p["delta"] = torch.randn(4, 16) * size
    p["g"] = p["g"] / 1e5
    want = exact(p, "low_rank")[2]
    for half, expected in zip(run(p, "low_rank", plan)[2].chunk(2), want.chunk(2), strict=True):
        assert (half - expected).norm() < 4e-3 * expected.norm()


def test_small_coefficients_of_tasks_in_float16():
    p = problem(96, 128, 16, dtype=torch.float16)
    x, g = torch.randn(8, 64, 128).half(), (torch.randn(8, 64, 96) / 1e5).half()
    table = (torch.randn(3, 4, 16) * 1e-4).requires_grad_()
    task = torch.arange(8) % 4 - 1
    operands = [p[name] for name in ("weight", "bias", "u", "s", "vh")]
    task_linear(x, *operands, table, task, core="low_rank").backward(g)
    exactly = table.detach().double().requires_grad_()
    weight, bias, u, _, vh = (t.double() for t in operands)
    y = reference.task_linear(x.double(), weight, bias, u, vh, exactly, task, "low_rank")
    y.backward(g.double())
    got, want = table.grad.chunk(2, 1), exactly.grad.chunk(2, 1)
    for half, expected in zip(got, want, strict=True):
        assert (half - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize("core", cores.CORES)
def test_coefficients_written_before_the_backward_raise(core):
    layer = fastspec.SpectralLinear.from_linear(nn.Linear(8, 8), 4, core=core)
    y = layer(torch.randn(3, 8)).sum()
    with torch.no_grad():
        layer.delta.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("core", cores.CORES)
def test_merging_is_in_float32_whatever_products_may_be_in(core, monkeypatch):
    layer = fastspec.SpectralLinear.from_linear(nn.Linear(8, 8), 4, core=core)
    seen = []
    real = torch.addmm
    monkeypatch.setattr(
        torch,
        "addmm",
        lambda *a, **kw: seen.append(torch.get_float32_matmul_precision()) or real(*a, **kw),
    )
    torch.set_float32_matmul_precision("medium")
    try:
        layer.effective_weight()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


@pytest.mark.parametrize("core", cores.CORES)
def test_merging_under_autocast_is_exact(core):
    torch.manual_seed(0)
    layer = fastspec.SpectralLinear.from_linear(nn.Linear(64, 64), 16, core=core)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.effective_weight(), layer.weight)
    nn.init.normal_(layer.delta, std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer.effective_weight()
    assert torch.equal(got, layer.effective_weight())


@pytest.mark.parametrize("forward", ["factored", "merged"])
def test_second_derivatives(forward):
    p = problem(7, 5, 4, n=4, dtype=torch.float64)

    def layer(x, bias, delta):
        return fastspec.spectral_linear(
            x, p["weight"], bias, p["u"], p["s"], p["vh"], delta,
            core="low_rank", plan=Plan(forward, "two_sided"),
        )  # fmt: skip

    leaves = [p[name].requires_grad_() for name in ("x", "bias", "delta")]
    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)
    frozen = p["delta"].detach()
    assert torch.autograd.gradgradcheck(lambda x, bias: layer(x, bias, frozen), leaves[:2])


def test_compiled_and_under_autocast():
    p = problem()
    config = {"core": "low_rank", "plan": None}

    def layer(x, delta):
        return fastspec.spectral_linear(
            x, p["weight"], p["bias"], p["u"], p["s"], p["vh"], delta, **config
        )

    x, delta = p["x"].clone().requires_grad_(), p["delta"].clone().requires_grad_()
    want = torch.autograd.grad(layer(x, delta).square().sum(), (x, delta))
    compiled = torch.compile(layer, fullgraph=True)
    got = torch.autograd.grad(compiled(x, delta).square().sum(), (x, delta))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, delta)
    assert y.dtype == torch.bfloat16
    assert_close(y, layer(x, delta).detach(), torch.bfloat16)
    assert torch.autograd.grad(y.float().sum(), delta)[0].dtype == torch.float32


def test_a_kept_copy():
    torch.manual_seed(0)
    plain = nn.Linear(24, 40)
    config = {"rank": 6, "core": "low_rank", "core_rank": 2}
    layer = fastspec.SpectralLinear.from_linear(plain, **config)
    nn.init.normal_(layer.delta, std=0.3)
    kept = copy.deepcopy(layer)
    kept.keep_merged()
    x, g = torch.randn(9, 24), torch.randn(9, 40)
    grads = []
    for module in (layer, kept):
        xi = x.clone().requires_grad_()
        y = module(xi)
        y.backward(g)
        grads.append((y.detach(), xi.grad, module.delta.grad))
    assert kept._kept is not None
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tasks_of_one_batch(dtype):
    p = problem(dtype=dtype)
    table = torch.randn(4, 4, 6, dtype=p["delta"].dtype) / 3
    task = torch.tensor([2, -1, 0, 2, 3])
    x = torch.randn(5, 3, 40).to(dtype)
    operands = (p["weight"], p["bias"], p["u"])
    got, want = [], []
    for exactly, into in ((False, got), (True, want)):
        leaves = [x.clone(), table.clone()]
        if exactly:
            leaves = [t.double() for t in leaves]
        xi, ti = (t.requires_grad_() for t in leaves)
        if exactly:
            y = reference.task_linear(
                xi, *(t.double() for t in operands), p["vh"].double(), ti, task, "low_rank"
            )
        else:
            y = task_linear(xi, *operands, p["s"], p["vh"], ti, task, core="low_rank")
        y.sum(0).square().sum().backward()
        into += [y.detach(), xi.grad, ti.grad]
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, dtype if dtype == torch.bfloat16 else None)
    assert torch.equal(got[0][1], nn.functional.linear(x, *operands[:2])[1])
    assert not got[2][1].any()  # no row names task 1


def test_a_row_without_a_task_is_not_touched_by_a_spoilt_one():
    p = problem()
    table = torch.full((1, 4, 6), float("nan"))
    task = torch.tensor([-1, -1])
    x = torch.randn(2, 40)
    y = task_linear(
        x, p["weight"], p["bias"], p["u"], p["s"], p["vh"], table, task, core="low_rank"
    )
    assert torch.equal(y, nn.functional.linear(x, p["weight"], p["bias"]))
    empty = task_linear(
        x[:0], p["weight"], p["bias"], p["u"], p["s"], p["vh"], table, task[:0], core="low_rank"
    )
    assert empty.shape == (0, 24)


def test_sums_are_exact():
    deltas = [torch.randn(2 * r, 5, dtype=torch.float64) for r in (1, 2)]
    total = summed(deltas, [0.5, -2.0], "low_rank")
    want = 0.5 * core_matrix(deltas[0], "low_rank") - 2 * core_matrix(deltas[1], "low_rank")
    assert total.shape == (6, 5)
    assert_close(core_matrix(total, "low_rank"), want)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan("spectral", "two_sided"), "thin factors of its own"),
        (Plan("merged", "short"), "thin factors of its own"),
        (Plan("saved", "dense"), "thin factors of its own"),
    ],
)
def test_plans_it_has_not(plan, words):
    with pytest.raises(ValueError, match=words):
        run(problem(), "low_rank", plan)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (0, 6), (2, 5)])
def test_a_storage_that_does_not_fit(shape):
    p = problem() | {"delta": torch.zeros(shape)}
    with pytest.raises(
        ValueError, match=r"delta must be \[2 \* core_rank, 6\] for core='low_rank'"
    ):
        run(p, "low_rank", None)


def test_rank_of_the_core_in_a_config():
    config = fastspec.SpectralConfig(core="low_rank", core_rank=3)
    assert fastspec.SpectralConfig(**config.to_dict()) == config
    with pytest.raises(ValueError, match="core_rank must be an integer >= 1, got 0"):
        fastspec.SpectralConfig(core="low_rank", core_rank=0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    fastspec.spectralize(
        model,
        fastspec.SpectralConfig(rank=4, core="low_rank", core_rank=3, target_modules=["0"]),
    )
    assert model[0].delta.shape == (6, 4)
    assert "core=low_rank(3)" in repr(model)


def test_sizes_are_checked_in_layers_too():
    make = fastspec.SpectralLinear.from_linear
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="core_rank must be an integer >= 1"):
            make(nn.Linear(8, 8), 4, core="low_rank", core_rank=size)
    with pytest.raises(ValueError, match="core_rank=3 is of core='low_rank', and core is 'band'"):
        make(nn.Linear(8, 8), 4, core="band", core_rank=3)
    with pytest.raises(ValueError, match="half_width=2 is of core='band', and core is 'diag'"):
        fastspec.SpectralConfig(half_width=2)
    with pytest.raises(ValueError, match=r"core must be one of 'diag', .* got 'lowrank'"):
        make(nn.Linear(8, 8), 4, core="lowrank")


def test_a_layer_pickled_before_there_was_this_core():
    layer = fastspec.SpectralLinear.from_linear(nn.Linear(8, 8), 4, core="band")
    layer.__dict__.pop("core_rank", None)
    assert "core=band(1)" in repr(layer)
