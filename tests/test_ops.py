"""The operators: every plan and core against the float64 reference, and what autograd and compile need."""

import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import TOLERANCE, assert_close, relative_error, singular_problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastspec import _extension
from fastspec.cores import CORES
from fastspec.ops import aten, reference
from fastspec.ops.functional import spectral_linear
from fastspec.ops.plan import Plan, short_side_is_legal, spectral_is_legal

# (out, in, k, n): squares, both orientations, k of 1, full rank, sizes that divide nothing, rows above and
# below the 128 from which csrc/ multiplies by products of its own
SIZES = [
    (1, 1, 1, 1),
    (8, 8, 3, 5),
    (63, 17, 17, 140),
    (17, 63, 5, 133),
    (96, 40, 1, 64),
    (40, 96, 40, 7),
]
FACTORS = ("weight", "u", "s", "vh", "delta")


def legal_plans(core, out_features, in_features, dtype, needs_dx=True, k=None):
    """Every plan of a layer; with k, the plans that need a complete basis too."""
    gradients = ["two_sided", "dense"]
    if short_side_is_legal(in_features, out_features, core, dtype, "cpu", needs_dx, True):
        gradients.append("short")
    plans = [Plan(f, g) for f, g in itertools.product(("merged", "factored"), gradients)]
    plans.append(Plan("saved", "dense"))
    if k is not None and spectral_is_legal(in_features, out_features, k, dtype, "cpu", True):
        plans.append(Plan("spectral", "two_sided"))
    return plans


def run(p, core, plan, needs_dx=True, needs_delta=True):
    """(y, dx, d delta, d bias) by the planned operator."""
    x = p["x"].clone().requires_grad_(needs_dx)
    delta = p["delta"].clone().requires_grad_(needs_delta)
    bias = None if p["bias"] is None else p["bias"].clone().requires_grad_()
    y = spectral_linear(
        x, p["weight"], bias, p["u"], p["s"], p["vh"], delta,
        core=core, singular_basis=True, plan=plan,
    )  # fmt: skip
    y.backward(p["g"])
    return y.detach(), x.grad, delta.grad, None if bias is None else bias.grad


def exact(p, core):
    """(y, dx, d delta, d bias) in float64 by the explicit formulas."""
    d = {n: None if t is None else t.double() for n, t in p.items()}
    y = reference.spectral_linear(d["x"], d["weight"], d["bias"], d["u"], d["vh"], d["delta"], core)
    dx, ddelta = reference.spectral_linear_backward(
        d["g"], d["x"], d["weight"], d["u"], d["vh"], d["delta"], core
    )
    return y, dx, ddelta, d["g"].sum(0)


CASES = [
    pytest.param(core, *size, plan, dtype, id=f"{core}-{size}-{plan}-{str(dtype)[6:]}")
    for core in CORES
    for size in SIZES
    for dtype in (torch.float32, torch.float64)
    for plan in legal_plans(core, size[0], size[1], dtype, k=size[2])
]


@pytest.mark.parametrize(("core", "out_features", "in_features", "k", "n", "plan", "dtype"), CASES)
def test_every_plan_agrees_with_the_reference(core, out_features, in_features, k, n, plan, dtype):
    for bias in (True, False):
        p = singular_problem(out_features, in_features, k, core=core, n=n, dtype=dtype, bias=bias)
        for got, want in zip(run(p, core, plan), exact(p, core), strict=True):
            if got is not None:
                assert_close(got, want)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forward", ["merged", "factored"])
@pytest.mark.parametrize("gradient", ["two_sided", "dense"])
def test_sixteen_bit_types(core, dtype, forward, gradient):
    p = singular_problem(48, 80, 12, core=core, n=50, dtype=dtype)
    for got, want in zip(run(p, core, Plan(forward, gradient)), exact(p, core), strict=True):
        assert_close(got, want, dtype)
    assert run(p, core, Plan(forward, gradient))[2].dtype == torch.float32


def test_sixteen_bit_plan_keeps_small_coefficients():
    """A merged bfloat16 weight would round shifts of a thousandth away; the chosen plan must not."""
    p = singular_problem(64, 64, 8, n=40, dtype=torch.bfloat16, bias=False)
    p["delta"] = p["delta"] * 0.01
    zero = dict(p, delta=torch.zeros_like(p["delta"]))
    correction = exact(p, "diag")[0] - exact(zero, "diag")[0]
    x, w = p["x"].double(), p["weight"].double()

    def error(forward):
        y = run(p, "diag", Plan(forward, "two_sided"))[0].double()
        plain = (x @ w.mT).bfloat16().double()
        return relative_error(y - plain, correction)

    assert error("factored") < error("merged")


@pytest.mark.parametrize("core", ["diag", "dense"])
@pytest.mark.parametrize("sizes", [(64, 24), (24, 64)], ids=["in<out", "out<in"])
@pytest.mark.parametrize("case", ["crossing zero", "exactly zero", "negative", "repeated"])
def test_short_side_leaves_for_the_two_sided_form_in_time(core, sizes, case):
    p = singular_problem(*sizes, 6, core="diag", n=200)
    sigma = {
        "crossing zero": torch.linspace(1, -1, 6) * 1e-3 + torch.tensor([2.0, 1, 0, 0, 0, 0]),
        "exactly zero": torch.tensor([2.0, 1, 1, 0, 1, 1]),
        "negative": -p["s"],
        "repeated": torch.full((6,), 1.5),
    }[case]
    p["delta"] = sigma - p["s"]
    if core == "dense":
        p["delta"] = torch.diag(p["delta"])
    for got, want in zip(run(p, core, Plan("merged", "short")), exact(p, core), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("share", [1 / 300, 1 / 30])
def test_one_small_direction_is_judged_alike_by_both_cores(share):
    """The measure of a dense core must not average one small direction away among 32."""
    s = torch.ones(32)
    delta = torch.zeros(32)
    delta[-1] = share - 1
    basis = torch.eye(40)[:, :32]
    for core, c in (("diag", delta), ("dense", torch.diag(delta))):
        taken = aten._unscaled(basis, s, c, core, left=True) is not None
        assert taken == (share > aten.SIGMA_FLOOR), core


@pytest.mark.parametrize("core", ["diag", "dense"])
@pytest.mark.parametrize("sizes", [(64, 24), (24, 64)], ids=["in<out", "out<in"])
def test_the_short_side_is_really_taken_and_left(core, sizes):
    """With a basis that is not the weight's the identity fails: a wrong gradient shows its use."""
    p = singular_problem(*sizes, 6, core=core, n=50)
    p["u" if sizes[0] > sizes[1] else "vh"] = (
        torch.linalg.qr(torch.randn(64, 6))[0]
        if sizes[0] > sizes[1]
        else torch.linalg.qr(torch.randn(64, 6))[0].mT
    )
    assert relative_error(run(p, core, Plan("merged", "short"))[2], exact(p, core)[2]) > 1e-2
    sigma = torch.ones(6)
    sigma[3] = 0.9 * aten.SIGMA_FLOOR
    p["delta"] = sigma - p["s"]
    if core == "dense":
        p["delta"] = torch.diag(p["delta"])
    assert_close(run(p, core, Plan("merged", "short"))[2], exact(p, core)[2])


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_needs_input_grad_is_honoured(core, shape, monkeypatch):
    p = singular_problem(*shape, 5, core=core)
    for plan in legal_plans(core, *shape, torch.float32, needs_dx=False):
        _, dx, ddelta, _ = run(p, core, plan, needs_dx=False)
        assert dx is None
        assert_close(ddelta, exact(p, core)[2])
    _, dx, ddelta, _ = run(p, core, Plan("merged", "none"), needs_delta=False)
    assert ddelta is None
    assert_close(dx, exact(p, core)[1])


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_spectral_form_starts_as_the_plain_layer(core, shape):
    """W = U S Vh holds to rounding only, so a zero shift must run on W itself."""
    p = singular_problem(*shape, min(shape), core=core, n=30)
    p["delta"] = torch.zeros_like(p["delta"])
    y, dx, ddelta, _ = run(p, core, Plan("spectral", "two_sided"))
    assert torch.equal(y, torch.nn.functional.linear(p["x"], p["weight"], p["bias"]))
    assert_close(dx, exact(p, core)[1])
    assert_close(ddelta, exact(p, core)[2])


def saved_numbers(p, core, plan, **kw):
    """How many numbers autograd keeps that are no argument of the layer itself."""
    own = {p[n].data_ptr() for n in FACTORS}
    kept = []

    def pack(t):
        if t.data_ptr() not in own:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = p["x"].clone().requires_grad_(kw.get("needs_dx", True))
        delta = p["delta"].requires_grad_(kw.get("needs_delta", True))
        spectral_linear(
            x, p["weight"], p["bias"], p["u"], p["s"], p["vh"], delta,
            core=core, singular_basis=True, plan=plan,
        )  # fmt: skip
    return sum(kept)


@pytest.mark.parametrize("core", CORES)
def test_only_p_is_saved(core):
    p = singular_problem(40, 24, 5, core=core, n=30)
    for plan in legal_plans(core, 40, 24, torch.float32):
        expected = 30 * 24 if plan.gradient == "dense" else 30 * 5
        expected += 40 * 24 if plan.forward == "saved" else 0
        assert saved_numbers(p, core, plan) == expected, plan
    assert saved_numbers(p, core, Plan("merged", "none"), needs_delta=False) == 0


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    "plan", [Plan("merged", "two_sided"), Plan("factored", "short"), Plan("merged", "dense")]
)
def test_empty_and_single_rows(n, plan):
    p = singular_problem(40, 24, 5, n=n)
    for got, want in zip(run(p, "diag", plan), exact(p, "diag"), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("forward", ["merged", "factored"])
def test_opcheck(core, shape, forward):
    p = singular_problem(*shape, 3, core=core, n=6)
    for gradient in ("two_sided", "dense"):
        x, delta = p["x"].clone().requires_grad_(), p["delta"].clone().requires_grad_()
        factors = (p["u"], p["s"], p["vh"])
        args = (x, p["weight"], p["bias"], *factors, delta, core, forward, gradient)
        torch.library.opcheck(torch.ops.fastspec.spectral_linear.default, args)
        saved = (p["x"], torch.randn(6, 3))
        back = (p["g"], *saved, p["weight"], *factors, p["delta"], core, forward, gradient)
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(
                torch.ops.fastspec.spectral_linear_backward.default, (*back, *needs)
            )


@pytest.mark.parametrize("core", CORES)
def test_gradcheck_of_the_operator(core):
    p = singular_problem(7, 5, 3, core=core, n=4, dtype=torch.float64)
    leaves = [p[n].requires_grad_() for n in ("x", "bias", "delta")]
    for plan in legal_plans(core, 7, 5, torch.float64):
        assert torch.autograd.gradcheck(
            lambda x, bias, delta, plan=plan: spectral_linear(
                x, p["weight"], bias, p["u"], p["s"], p["vh"], delta,
                core=core, singular_basis=True, plan=plan,
            ),
            leaves,
        )  # fmt: skip


def layer_call(p, plan=None):
    def call(x, delta):
        return spectral_linear(
            x, p["weight"], p["bias"], p["u"], p["s"], p["vh"], delta,
            singular_basis=True, plan=plan,
        )  # fmt: skip

    return call


def test_double_use_in_one_graph_and_checkpointing():
    p = singular_problem(24, 24, 5)
    call = layer_call(p, Plan("merged", "two_sided"))

    def grads(wrap):
        x, delta = p["x"].clone().requires_grad_(), p["delta"].clone().requires_grad_()
        wrap(call, wrap(call, x, delta).relu(), delta).backward(p["g"])
        return x.grad, delta.grad

    plain = grads(lambda f, *a: f(*a))
    again = grads(lambda f, *a: checkpoint(f, *a, use_reentrant=False))
    d = {n: t.double() for n, t in p.items()}
    x, delta = d["x"].requires_grad_(), d["delta"].requires_grad_()

    def ref(x):
        return reference.spectral_linear(x, d["weight"], d["bias"], d["u"], d["vh"], delta)

    ref(ref(x).relu()).backward(d["g"])
    for a, b, want in zip(plain, again, (x.grad, delta.grad), strict=True):
        assert torch.equal(a, b)
        assert_close(a, want)


def test_scratch_is_private_to_a_thread():
    """Two threads in the merged form at once would spoil one shared buffer."""
    problems = [singular_problem(128, 128, 8, n=64, seed=s) for s in range(4)]
    expected = [run(p, "diag", Plan("merged", "two_sided")) for p in problems]
    failures = []

    def work(i):
        for _ in range(30):
            got = run(problems[i], "diag", Plan("merged", "two_sided"))
            if not all(torch.equal(a, b) for a, b in zip(got, expected[i], strict=True)):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_scratch_made_in_inference_mode_serves_training():
    p = singular_problem(24, 24, 5)

    def work():  # a thread of its own has no scratch yet
        with torch.inference_mode():
            layer_call(p, Plan("merged", "none"))(p["x"], p["delta"])
        return run(p, "diag", Plan("merged", "two_sided"))

    with ThreadPoolExecutor(1) as pool:
        for got, want in zip(pool.submit(work).result(), exact(p, "diag"), strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("core", CORES)
def test_function_transforms(core):
    """vmap over samples and forward mode give what the reference gives."""
    p = singular_problem(12, 8, 3, core=core, dtype=torch.float64)

    def loss(delta, x, g):
        y = spectral_linear(
            x,
            p["weight"],
            p["bias"],
            p["u"],
            p["s"],
            p["vh"],
            delta,
            core=core,
            singular_basis=True,
        )
        return (y * g).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(p["delta"], p["x"], p["g"])
    assert_close(each.sum(0), exact(p, core)[2])
    _, along = torch.func.jvp(lambda d: loss(d, p["x"], p["g"]), (p["delta"],), (p["delta"],))
    assert_close(along, (exact(p, core)[2] * p["delta"]).sum())


@pytest.mark.skipif(
    _extension.unavailable_reason() is not None, reason="the compiled part is not there"
)
def test_all_of_this_without_the_compiled_part():
    """The operators in Python serve other machines: this file again, with csrc/ switched off."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"FASTSPEC_NO_EXT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 skipped" in done.stdout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_the_products_and_not_the_coefficients(dtype):
    p = singular_problem(40, 24, 5, n=30)
    x, delta = p["x"].clone().requires_grad_(), p["delta"].clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = layer_call(p)(x, delta)
    assert y.dtype == dtype
    y.backward(p["g"].to(dtype))
    assert x.grad.dtype == torch.float32
    assert delta.grad.dtype == torch.float32
    want = exact(p, "diag")
    for got, w in zip((y, x.grad, delta.grad), want[:3], strict=True):
        assert relative_error(got, w) < TOLERANCE[dtype]


def test_compile_fullgraph_without_recompilation():
    p = singular_problem(40, 24, 5, n=30)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer_call(p), fullgraph=True, backend=counter)
    for shift in (0.0, 0.5, -1.0):
        x = p["x"].clone().requires_grad_()
        delta = (p["delta"] + shift).requires_grad_()
        compiled(x, delta).backward(p["g"])
        want = exact(dict(p, delta=delta.detach()), "diag")
        assert_close(x.grad, want[1])
        assert_close(delta.grad, want[2])
    assert counter.frame_count == 1


def test_weights_that_need_gradients_get_them():
    p = singular_problem(12, 8, 3, dtype=torch.float64)
    w = p["weight"].clone().requires_grad_()
    y = spectral_linear(p["x"], w, None, p["u"], p["s"], p["vh"], p["delta"])
    y.backward(p["g"])
    assert_close(w.grad, p["g"].mT @ p["x"])


def test_errors_name_the_argument():
    p = singular_problem(12, 8, 3)
    good = [p[n] for n in ("x", "weight", "bias", "u", "s", "vh", "delta")]

    def call(position, value, **kw):
        args = list(good)
        args[position] = value
        return spectral_linear(*args, **kw)

    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 8\].*got \(17, 9\)"):
        call(0, torch.randn(17, 9))
    with pytest.raises(ValueError, match=r"delta must be \[3\], got \[4\]"):
        call(6, torch.zeros(4))
    with pytest.raises(ValueError, match=r"delta must be .*band"):
        call(6, torch.zeros(2, 3), core="band")
    with pytest.raises(ValueError, match=r"u must be \[12, 3\], got \[11, 3\]"):
        call(3, torch.zeros(11, 3))
    with pytest.raises(TypeError, match=r"dtype torch.float32, got torch.float64"):
        call(0, p["x"].double())
    with pytest.raises(TypeError, match="floating"):
        call(0, torch.ones(4, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="core must be"):
        call(0, p["x"], core="full")
    with pytest.raises(ValueError, match="singular_basis"):
        call(0, p["x"], plan=Plan("merged", "short"))
    with pytest.raises(ValueError, match=r"only beside gradient='dense'.*got gradient='two_sided'"):
        call(0, p["x"], plan=Plan("saved", "two_sided"))
    with pytest.raises(ValueError, match="give `effective` instead"):
        call(0, p["x"], plan=Plan("resident", "two_sided"))
    with pytest.raises(ValueError, match=r"effective must be \[12, 8\].*got \[8, 12\]"):
        call(0, p["x"], effective=p["weight"].mT)
    with pytest.raises(ValueError, match="exclude each other"):
        call(0, p["x"], effective=p["weight"], plan=Plan("merged", "two_sided"))
    with pytest.raises(ValueError, match=r"complete singular basis.*k=3 of 8"):
        call(0, p["x"], plan=Plan("spectral", "two_sided"), singular_basis=True)
