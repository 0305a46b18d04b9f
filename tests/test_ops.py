"""The operators: every plan and core against the float64 reference, the short side, scratch, errors."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ops_support import check, exact, layer_call, run
from support import TOLERANCE, assert_close, relative_error, singular_problem

from fastspec import _extension
from fastspec.cores import CORES, LINEAR
from fastspec.ops import aten
from fastspec.ops.functional import spectral_linear
from fastspec.ops.plan import LayerCall, Plan, legal_plans

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
CASES = [
    pytest.param(core, *size, plan, dtype, id=f"{core}-{size}-{plan}-{str(dtype)[6:]}")
    for core in CORES
    for size in SIZES
    for dtype in (torch.float32, torch.float64)
    for plan in legal_plans(LayerCall(size[3], size[1], size[0], size[2], core, dtype))
]


@pytest.mark.parametrize(("core", "out_features", "in_features", "k", "n", "plan", "dtype"), CASES)
def test_every_plan_agrees_with_the_reference(core, out_features, in_features, k, n, plan, dtype):
    for bias in (True, False):
        p = singular_problem(out_features, in_features, k, core=core, n=n, dtype=dtype, bias=bias)
        check(run(p, core, plan), exact(p, core))


@pytest.mark.parametrize("core", LINEAR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forward", ["merged", "factored"])
@pytest.mark.parametrize("gradient", ["two_sided", "dense"])
def test_sixteen_bit_types(core, dtype, forward, gradient):
    p = singular_problem(48, 80, 12, core=core, n=50, dtype=dtype)
    check(run(p, core, Plan(forward, gradient)), exact(p, core), dtype)
    assert run(p, core, Plan(forward, gradient))[2].dtype == torch.float32


@pytest.mark.parametrize("core", LINEAR)
@pytest.mark.parametrize("delta_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", ["two_sided", "dense"])
@pytest.mark.parametrize("operators", ["chosen", "aten"])
def test_coefficients_of_sixteen_bits_are_summed_in_float32(
    core, delta_dtype, dtype, gradient, operators
):
    p = singular_problem(24, 40, 6, core=core, n=2000, dtype=dtype)
    p["delta"] = p["delta"].to(delta_dtype)
    p["g"] = p["g"].abs()  # sums that grow, where 16 bits would stop
    p["x"] = p["x"].abs()
    if operators == "aten":
        factors = (p["u"], p["s"], p["vh"], p["delta"], core, "merged", gradient)
        thin = aten.spectral_linear(p["x"], p["weight"], p["bias"], *factors)[1]
        got = aten.spectral_linear_backward(
            p["g"], p["x"], thin, p["weight"], *factors, True, True
        )[1]
    else:
        got = run(p, core, Plan("merged", gradient))[2]
    assert got.dtype == delta_dtype
    rounding = torch.finfo(delta_dtype).eps + torch.finfo(dtype).eps
    assert relative_error(got, exact(p, core)[2]) < rounding


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
    check(run(p, core, Plan("merged", "short")), exact(p, core))


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
    for share, taken in ((1.1, True), (0.9, False)):
        sigma = torch.ones(6)
        sigma[3] = share * aten.SIGMA_FLOOR
        shift = sigma - p["s"]
        q = dict(p, delta=torch.diag(shift) if core == "dense" else shift)
        error = relative_error(run(q, core, Plan("merged", "short"))[2], exact(q, core)[2])
        assert (error > TOLERANCE[torch.float32]) == taken


@pytest.mark.parametrize("core", ["diag", "dense"])
@pytest.mark.parametrize("kind", ["even", "one entry"])
@pytest.mark.parametrize("size", [0.0, 1.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("operators", ["chosen", "aten"])
def test_a_large_bias_costs_the_short_side_no_digits(core, kind, size, operators):
    """p = (y - b) U / sigma has the digits of y, which a large bias takes from x W^T."""
    p = singular_problem(24, 64, 6, core=core, n=300)
    p["bias"] = p["bias"] * size if kind == "even" else torch.eye(24)[5] * size
    factors = (p["x"], p["weight"], p["bias"], p["u"], p["s"], p["vh"], p["delta"], core)
    if operators == "aten":
        thin = aten.spectral_linear(*factors, "merged", "short")[1]
    else:
        thin = torch.ops.fastspec.spectral_linear(*factors, "merged", "short")[1]
    want = p["x"].double() @ p["vh"].double().mT
    assert relative_error(thin, want) < 3e-6
    if operators == "chosen":
        assert relative_error(run(p, core, Plan("merged", "short"))[2], exact(p, core)[2]) < 3e-6


def test_a_few_large_rows_hide_no_lost_digits():
    p = singular_problem(24, 64, 6, n=300)
    p["bias"] = p["bias"] * 1e4
    p["x"][::100] *= 1e4
    thin = aten.spectral_linear(
        *(p[n] for n in ("x", "weight", "bias", "u", "s", "vh", "delta")), "diag", "merged", "short"
    )[1]
    want = p["x"].double() @ p["vh"].double().mT
    assert relative_error(thin[1:100], want[1:100]) < 3e-6


@pytest.mark.parametrize("core", LINEAR)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_spectral_form_starts_as_the_plain_layer(core, shape):
    """W = U S Vh holds to rounding only, so a zero shift must run on W itself."""
    p = singular_problem(*shape, min(shape), core=core, n=30)
    p["delta"] = torch.zeros_like(p["delta"])
    y, dx, ddelta, _ = run(p, core, Plan("spectral", "two_sided"))
    assert torch.equal(y, torch.nn.functional.linear(p["x"], p["weight"], p["bias"]))
    assert_close(dx, exact(p, core)[1])
    assert_close(ddelta, exact(p, core)[2])


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    "plan", [Plan("merged", "two_sided"), Plan("factored", "short"), Plan("merged", "dense")]
)
def test_empty_and_single_rows(n, plan):
    p = singular_problem(40, 24, 5, n=n)
    check(run(p, "diag", plan), exact(p, "diag"))


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
        check(pool.submit(work).result(), exact(p, "diag"))


@pytest.mark.skipif(_extension.load() is not None, reason="the compiled part is not there")
def test_all_of_this_without_the_compiled_part():
    """The operators in Python serve other machines: these files again, with csrc/ switched off."""
    files = [__file__, str(Path(__file__).with_name("test_ops_autograd.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *files],
        env=os.environ | {"FASTSPEC_NO_EXT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 skipped" in done.stdout


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
