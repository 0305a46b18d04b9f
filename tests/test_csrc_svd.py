"""The operators of csrc/ behind topk_svd, called directly."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from fastspec import _extension
from fastspec.svd.options import Options
from fastspec.svd.topk import leading_triplets

pytestmark = pytest.mark.skipif(_extension.load() is not None, reason=str(_extension.load()))


PROBLEM = Options(k=4, tol=1e-5, floor=2**-8, max_steps=0, seed=0, width=4, most=4096)


def topk(w, op="topk_svd", **changes):
    """left [L, m, k], s [L, k], right [L, n, k], residual [L]."""
    return getattr(torch.ops.fastspec, op)(w, **vars(dataclasses.replace(PROBLEM, **changes)))


def subspace(w, **options):
    return topk(w, **options)[2]


def sine(right: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Of the largest angle between `right [L, n, k]` and the exact leading right subspaces."""
    exact = torch.linalg.svd(w.double())[2][:, : right.shape[-1]].mT
    found = torch.linalg.qr(right.double())[0]
    return torch.linalg.matrix_norm(found - exact @ (exact.mT @ found), ord=2)


def allowed_sine(w: torch.Tensor, k: int, tol: float = 1e-5) -> torch.Tensor:
    """What a residual of `tol` in each of k eigenvectors of W^T W allows: Davis and Kahan."""
    values = torch.linalg.svdvals(w.double()) ** 2
    return k**0.5 * tol * values[:, 0] / (values[:, k - 1] - values[:, k])


# matrix by matrix, as a CPU runs it, and all of a stack in step, as other devices do
both_ways = pytest.mark.parametrize("op", ["topk_svd", "topk_svd_in_step"])


@pytest.fixture
def stack() -> torch.Tensor:
    return torch.randn(5, 90, 70, generator=torch.Generator().manual_seed(0))


@both_ways
@pytest.mark.parametrize("gram_short", [0, 1024], ids=["products", "gram"])
@pytest.mark.parametrize("width", [1, 3, 4, 16, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subspace(stack, op: str, gram_short: int, width: int, dtype: torch.dtype) -> None:
    w = stack.to(dtype)
    right = subspace(w, width=width, gram_short=gram_short, op=op)
    assert (sine(right, w) <= allowed_sine(w, 4)).all()


def test_a_matrix_gets_the_same_bits_in_any_stack(stack) -> None:
    assert torch.equal(subspace(stack), subspace(stack))
    # the last matrix of an odd stack has all threads, on which LAPACK rounds otherwise beyond an order of 64:
    # so smaller ones, and stacks of one matrix to a thread
    for w in (stack[..., :60], stack.repeat(torch.get_num_threads(), 1, 1)):
        whole = subspace(w.contiguous())
        reversed_ = subspace(w.flip(0).contiguous()).flip(0)
        assert torch.equal(whole, reversed_)


@both_ways
def test_transposed_and_strided_input(stack, op: str) -> None:
    transposed, strided = stack.mT.contiguous().mT, torch.stack([stack, -stack], dim=-1)[..., 0]
    for w in (transposed, strided):
        assert (sine(subspace(w, op=op), stack) <= allowed_sine(stack, 4)).all()


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 5, 17, 31, 64, 65, 131])
@pytest.mark.parametrize("transposed", [False, True])
def test_sides_of_every_remainder(n: int, transposed: bool, dtype: torch.dtype, op: str) -> None:
    w = torch.randn(2, n + 30, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    w = w.mT.contiguous().mT if transposed else w
    _, s, _, residual = topk(w, k=min(n, 7), op=op)
    exact = torch.linalg.svdvals(w.double())[:, : min(n, 7)]
    assert (residual <= 1e-5).all()
    assert (s.double() - exact).abs().max() <= 1e-5 * exact.max()


@both_ways
def test_matrices_that_need_different_numbers_of_steps(op: str) -> None:
    g = torch.Generator().manual_seed(0)
    decay = torch.tensor([3.0, 0.3, 1.0, 0.6])[:, None]
    w = torch.randn(4, 120, 100, generator=g) * ((1 + torch.arange(100.0)) ** -decay)[:, None]
    _, s, _, residual = topk(w, k=8, op=op)
    assert (residual <= 1e-5).all()
    assert (s.double() / torch.linalg.svdvals(w.double())[:, :8] - 1).abs().max() <= 1e-5


def test_step_limit_still_gives_k_vectors(stack) -> None:
    right = subspace(stack, k=20, max_steps=1)
    assert right.shape == (5, 70, 20)
    eye = torch.eye(20)
    assert (right.mT @ right - eye).abs().max() < 1e-5


@both_ways
@pytest.mark.parametrize("gram_short", [0, 1024], ids=["wider", "gram"])
def test_multiplicity_above_the_width(op: str, gram_short: int) -> None:
    q = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    w = (q * torch.where(torch.arange(64) < 20, 2.0, 0.5)) @ q.mT
    assert sine(
        subspace(w[None], k=20, width=4, gram_short=gram_short, op=op), w[None]
    ) <= allowed_sine(w[None], 20)


@pytest.mark.parametrize("width", [0, 4], ids=["gram", "krylov"])
def test_residual_is_that_of_the_returned_vectors(stack, width: int) -> None:
    left, s, right, residual = topk(stack, width=width)
    forward = (stack @ right - left * s[:, None]).norm(dim=1) / s
    backward = (stack.mT @ left - right * s[:, None]).norm(dim=1) / s
    measured = torch.maximum(forward, backward).amax(dim=1)
    assert (residual <= 1e-5).all()
    assert (measured <= residual + 1e-6).all()
    assert (residual <= measured + 1e-6).all()


def test_every_option_is_an_argument_without_a_default() -> None:
    """So that a constant that one implementation lacks, or names otherwise, is an error at the first call."""
    for op in (torch.ops.fastspec.topk_svd, torch.ops.fastspec.topk_svd_in_step):
        arguments = op.default._schema.arguments[1:]
        assert {a.name for a in arguments} == {f.name for f in dataclasses.fields(Options)}
        assert all(a.kwarg_only and not a.has_default_value() for a in arguments)


def with_values(s: torch.Tensor) -> torch.Tensor:
    """A matrix [1, n + 10, n] of these singular values."""
    n, g = len(s), torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(n + 10, n, generator=g))[0]
    right = torch.linalg.qr(torch.randn(n, n, generator=g))[0]
    return ((left * s) @ right.mT)[None]


SPECTRA = {
    "slow": with_values(torch.linspace(2, 0.5, 90)),
    "steep": with_values(0.5 ** torch.arange(90)),
    "multiple": with_values(torch.where(torch.arange(90) < 12, 2.0, 0.5)),
    "rank 6": with_values((torch.arange(90) < 6).float()),
}
# what a change of every option must show in: a spectrum, the options beside, the change
EFFECTS = {
    "k": ("slow", {}, 3),
    "tol": ("slow", {}, 1e-2),
    "floor": ("steep", {"k": 8}, 0.5),
    "max_steps": ("slow", {}, 3),
    "seed": ("slow", {}, 1),
    "width": ("slow", {}, 3),
    "most": ("slow", {}, 24),
    "gram_short": ("slow", {}, 10),
    "first_check": ("slow", {}, -20),
    "restarted_lengths": ("slow", {"most": 16, "tol": 1e-6, "first_check": 0}, 0),
    "margin": ("slow", {"tol": 1e-2, "first_check": -20}, 1e-3),
    "coincidence": ("multiple", {"k": 12, "first_check": -20}, -1.0),
    "small": ("rank 6", {"k": 8}, 0.0),
    "wide_ratio": ("slow", {}, 1.0),
    "stagnation": ("slow", {"first_check": -20}, 1e6),
    "negligible": ("slow", {}, 1e12),
    "breakdown": ("slow", {}, 1e12),
}


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(Options)])
def test_every_option_counts_in_both_implementations(option: str) -> None:
    """A field that one of them reads in another's place, or does not read, changes no bit of its result."""
    spectrum, beside, value = EFFECTS[option]
    w = SPECTRA[spectrum]
    options = dataclasses.replace(PROBLEM, **beside)
    changed = dataclasses.replace(options, **{option: value})

    def compiled(w, options):
        return torch.ops.fastspec.topk_svd(w, **vars(options))

    def stepped(w, options):
        return torch.ops.fastspec.topk_svd_in_step(w, **vars(options))

    for run in (leading_triplets, compiled, stepped):
        before, again, after = run(w, options), run(w, options), run(w, changed)
        assert all(map(torch.equal, before, again))
        assert not all(map(torch.equal, before, after)), run.__name__


@both_ways
@pytest.mark.parametrize("most", [1, 30, 45])
@pytest.mark.parametrize("width", [1, 4])
def test_restart_reaches_the_tolerance_in_a_bounded_basis(
    stack, op: str, width: int, most: int
) -> None:
    decaying = stack * (1 + torch.arange(70)) ** -0.5
    _, s, _, residual = topk(decaying, k=8, width=width, most=most, op=op)
    assert (residual <= 1e-5).all()
    exact = torch.linalg.svdvals(decaying.double())[:, :8]
    assert (s.double() - exact).abs().max() <= 1e-6 * exact.max()


def test_the_interpreter_is_free_while_it_runs() -> None:
    w = torch.randn(1200, 1200, generator=torch.Generator().manual_seed(0))
    worker = threading.Thread(target=topk, args=(w[None],), kwargs={"k": 64, "tol": 1e-7})
    worker.start()
    counted = 0
    while worker.is_alive():
        counted += 1
        time.sleep(0.001)
    assert counted > 20


# What takes ten seconds and more: large matrices one after the other, and so small a basis that a flat
# spectrum restarts it again and again. On two threads the calling one may be done at once, and wait.
RESTARTED = vars(dataclasses.replace(PROBLEM, k=40, tol=1e-7, most=56))
TOGETHER = "torch.ops.fastspec.topk_svd(torch.stack([{}, {}]), **{})"
LONG = {
    "one after the other": "fastspec.topk_svd(torch.randn(2, 6000, 6000), 600, tol=1e-7)",
    "together": TOGETHER.format("flat", "flat", RESTARTED),
    "second alone": TOGETHER.format("steep", "flat", RESTARTED),
    "first alone": TOGETHER.format("flat", "steep", RESTARTED),
}


@pytest.mark.parametrize("call", LONG)
def test_interrupt_ends_a_call_at_once(call: str) -> None:
    code = (
        "import torch, fastspec, signal\n"
        # ignored in what a shell starts in the background, and inherited
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "torch.set_num_threads(2)\n"
        "flat = torch.randn(4000, 4000)\n"
        "steep = flat * 0.9 ** torch.arange(4000)\n"
        "fastspec.topk_svd(flat[:9, :9], 2); print('ready', flush=True)\n"
        f"try:\n    {LONG[call]}\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    time.sleep(2)
    run.send_signal(signal.SIGINT)
    asked = time.perf_counter()
    assert run.communicate(timeout=60)[0] == "interrupted\n"
    assert time.perf_counter() - asked < 10


def rotated(values: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix of these eigenvalues, float64."""
    n = len(values)
    q = torch.linalg.qr(
        torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    )[0]
    a = (q * values.double()) @ q.mT
    return (a + a.mT) / 2


SYMMETRIC = {
    "random signs": lambda n: rotated(torch.linspace(-1, 1, n)),
    "graded to 1e-12": lambda n: rotated(torch.logspace(0, -12, n, dtype=torch.float64)),
    "graded to -1e-12": lambda n: rotated(-torch.logspace(0, -12, n, dtype=torch.float64)),
    "all equal": lambda n: rotated(torch.ones(n)),
    "two values": lambda n: rotated((torch.arange(n) % 2).double()),
    "clusters": lambda n: rotated(1 + 1e-9 * torch.arange(n).double()),
    "rank one": lambda n: torch.ones(n, n, dtype=torch.float64),
    "zero": lambda n: torch.zeros(n, n, dtype=torch.float64),
    "diagonal": lambda n: torch.diag(torch.arange(n, 0, -1).double()),
    "ones beside the diagonal": lambda n: torch.ones(n, n).double().triu(-1).tril(1),
    "tiny": lambda n: 1e-30 * rotated(torch.linspace(-1, 1, n)),
    "huge": lambda n: 1e30 * rotated(torch.linspace(-1, 1, n)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 3, 33])
@pytest.mark.parametrize("kind", SYMMETRIC)
def test_jacobi(kind: str, n: int, dtype: torch.dtype) -> None:
    check_jacobi(SYMMETRIC[kind](n).to(dtype))


@pytest.mark.parametrize("kind", ["graded to 1e-12", "two values", "all equal", "clusters"])
def test_jacobi_of_large_orders(kind: str) -> None:
    check_jacobi(SYMMETRIC[kind](128))
    check_jacobi(SYMMETRIC[kind](255).float())
    check_jacobi(SYMMETRIC[kind](256))


def check_jacobi(a: torch.Tensor) -> None:
    """At rounding level. Measured at n=128: up to 20 and 68 roundings, of LAPACK up to 21 and 20."""
    n, eps = len(a), torch.finfo(a.dtype).eps
    values, vectors = (t[0] for t in torch.ops.fastspec.jacobi_eigh(a[None]))
    assert (values[1:] >= values[:-1]).all()
    wide, exact = vectors.double(), torch.linalg.eigvalsh(a.double())
    norm = max(float(exact.abs().max()), torch.finfo(a.dtype).tiny)
    residual = (a.double() @ wide - wide * values.double()).norm(dim=0)
    assert residual.max() <= (10 + n / 4) * eps * norm
    assert (wide.mT @ wide - torch.eye(n)).abs().max() <= (10 + n) * eps
    assert (values.double() - exact).abs().max() <= (10 + n / 4) * eps * norm


def test_jacobi_reads_the_lower_triangle_and_any_layout() -> None:
    a = rotated(torch.arange(9))
    stack = torch.stack([a, 2 * a, a + 1])
    spoiled = stack + 7 * torch.ones(9, 9).double().triu(1)
    found = torch.ops.fastspec.jacobi_eigh(stack)
    for other in (spoiled, spoiled.mT.contiguous().mT):
        assert all(map(torch.equal, found, torch.ops.fastspec.jacobi_eigh(other)))
    for i in range(3):  # each by itself, bit for bit
        alone = torch.ops.fastspec.jacobi_eigh(stack[i : i + 1])
        assert torch.equal(alone[1][0], found[1][i])


def test_jacobi_of_no_matrices() -> None:
    values, vectors = torch.ops.fastspec.jacobi_eigh(torch.empty(0, 5, 5))
    assert (values.shape, vectors.shape) == ((0, 5), (0, 5, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("place", [(0, 0), (6, 2)], ids=str)
def test_jacobi_of_what_has_no_eigenvalues_is_nan(bad: float, place: tuple[int, int]) -> None:
    """In every entry of the result, none left as it was found; the others of the stack do not notice."""
    good = rotated(torch.arange(7)).float()
    stack = torch.stack([good, good, good])
    stack[1][place] = bad
    values, vectors = torch.ops.fastspec.jacobi_eigh(stack)
    assert values[1].isnan().all()
    assert vectors[1].isnan().all()
    alone = torch.ops.fastspec.jacobi_eigh(good[None])
    for i in (0, 2):
        assert torch.equal(values[i], alone[0][0])
        assert torch.equal(vectors[i], alone[1][0])


def test_opcheck(stack) -> None:
    for op in ("topk_svd", "topk_svd_in_step"):
        for width in (0, 4):
            options = vars(dataclasses.replace(PROBLEM, width=width))
            torch.library.opcheck(getattr(torch.ops.fastspec, op).default, (stack,), options)
    torch.library.opcheck(torch.ops.fastspec.jacobi_eigh.default, (stack.mT @ stack,))


ERRORS = {
    "order 256 at most": lambda w: torch.ops.fastspec.jacobi_eigh(torch.zeros(1, 257, 257)),
    "must be a stack": lambda w: subspace(w[0]),
    "short side last": lambda w: subspace(w.mT),
    "k must lie between 1 and 70": lambda w: subspace(w, k=71),
    "width must be 0 or more": lambda w: subspace(w, width=-1),
    "must hold square matrices": lambda w: torch.ops.fastspec.jacobi_eigh(w),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(stack, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ERRORS[message](stack)


def test_wrong_dtype(stack) -> None:
    with pytest.raises(TypeError, match="must be float32 or float64"):
        subspace(stack.bfloat16())
