"""topk_svd: contract, accuracy on hard spectra, independence of stack, seed and method."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from svd_support import (  # noqa: F401 - a fixture
    implementation,
    slow_decay,
    with_spectrum,
    worst_residual,
)
from torch import Tensor

from fastspec.svd import krylov
from fastspec.svd.topk import ConvergenceWarning, TopkSVD, topk_svd


def check(w: Tensor, found: TopkSVD, k: int, tol: float = 1e-5) -> None:
    """Everything promised of the triplets of one matrix whose factors are stored in full width."""
    m, n = w.shape
    assert found.u.shape == (m, k)
    assert found.s.shape == (k,)
    assert found.vh.shape == (k, n)
    assert bool(found.converged)
    assert float(found.residual) <= tol
    assert worst_residual(w, found) <= 1.05 * tol
    eye = torch.eye(k, dtype=torch.float64)
    assert (found.u.double().mT @ found.u.double() - eye).abs().max() <= 1e-5
    assert (found.vh.double() @ found.vh.double().mT - eye).abs().max() <= 1e-5
    assert (found.s[:-1] >= found.s[1:]).all()
    exact = torch.linalg.svdvals(w.double())[:k]
    assert (found.s.double() - exact).abs().max() <= 1e-6 * exact[0]
    if k:
        size = found.vh.abs()
        first = (size >= 0.99 * size.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1)
        assert (found.vh[torch.arange(k), first] > 0).all()


SPECTRA = {
    "slow": slow_decay,
    "fast": lambda r: 0.7 ** torch.arange(r, dtype=torch.float64),
    "flat": lambda r: torch.linspace(1.0, 0.5, r, dtype=torch.float64),
    "equal": lambda r: torch.ones(r, dtype=torch.float64),
    "two values": lambda r: torch.where(torch.arange(r) < r // 3, 1.0, 0.3).double(),
    "clusters": lambda r: 0.8 ** (torch.arange(r) // 20).double(),
    "rank 5": lambda r: (torch.arange(r) < 5).double(),
    "graded to 1e-12": lambda r: torch.logspace(0, -12, r, dtype=torch.float64),
    "steep": lambda r: 0.3 ** torch.arange(r, dtype=torch.float64),
    "one, then 1e-4": lambda r: torch.where(torch.arange(r) < 1, 1.0, 1e-4).double(),
    "outlier": lambda r: torch.cat([torch.tensor([1000.0]).double(), slow_decay(r - 1)]),
    "zero": lambda r: torch.zeros(r, dtype=torch.float64),
}
SHAPES = [(300, 300), (500, 260), (260, 500), (40, 40), (7, 90), (90, 7)]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_hard_spectra(spectrum: str, shape: tuple[int, int]) -> None:
    short = min(shape)
    w = with_spectrum(*shape, SPECTRA[spectrum](short))
    for k in sorted({1, min(12, short), short}):
        check(w, topk_svd(w, k), k)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(41, 41), (60, 60), (260, 160), (300, 300)], ids=str)
def test_hard_spectra_in_float64(spectrum: str, shape: tuple[int, int]) -> None:
    short = min(shape)
    w = with_spectrum(*shape, SPECTRA[spectrum](short), dtype=torch.float64)
    for k in sorted({12, 24, short}):
        check(w, topk_svd(w, k), k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    w = with_spectrum(64, 48, slow_decay(48)).to(dtype)
    stored = topk_svd(w, 6)
    assert stored.u.dtype == stored.vh.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert stored.s.dtype == stored.residual.dtype == wide
    asked = topk_svd(w, 6, dtype=wide)
    check(w, asked, 6)
    assert torch.equal(stored.u, asked.u.to(dtype))
    assert torch.equal(stored.s, asked.s)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15])
def test_scale_changes_nothing(scale: float) -> None:
    w = torch.randn(300, 280, generator=torch.Generator().manual_seed(0))
    power = 2.0 ** round(torch.log2(torch.tensor(scale)).item())
    a, b = topk_svd(w, 4), topk_svd(w * power, 4)
    assert torch.equal(a.u, b.u)
    assert torch.equal(a.s * power, b.s)


def test_one_row_and_one_column() -> None:
    for shape in ((1, 9), (9, 1), (1, 1)):
        w = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        check(w, topk_svd(w, 1), 1)


def test_tall_embedding() -> None:
    w = torch.randn(30522, 64, generator=torch.Generator().manual_seed(0)) * slow_decay(64).float()
    check(w, topk_svd(w, 16), 16)


@pytest.mark.parametrize(("short", "k"), [(48, 8), (300, 8)], ids=["gram", "krylov"])
def test_same_result_alone_stacked_and_listed(short: int, k: int) -> None:
    assert krylov.worthwhile(k, short) == (short == 300)
    stack = torch.stack([with_spectrum(short + 20, short, slow_decay(short), i) for i in range(4)])
    stacked = topk_svd(stack, k)
    listed = topk_svd([stack[2], stack[0], torch.randn(5, 3), stack[1]], [k, k, 2, k])
    small = topk_svd(stack, k, workspace=1)
    for alone, i in ((topk_svd(stack[2], k), 2), (listed[0], 2), (listed[1], 0), (listed[3], 1)):
        for other in (stacked, small):
            assert (alone.s - other.s[i]).abs().max() <= 1e-6 * alone.s[0]
            overlap = (alone.vh.double() @ other.vh[i].double().mT).abs().diagonal()
            assert overlap.min() > 1 - 1e-6
            assert (alone.u - other.u[i]).abs().max() < 1e-3  # signs agree too
    assert listed[2].u.shape == (5, 2)


def test_seed_moves_nothing_but_rounding() -> None:
    w = with_spectrum(320, 300, slow_decay(300))
    a, b = topk_svd(w, 10, seed=0), topk_svd(w, 10, seed=12345)
    assert (a.s - b.s).abs().max() <= 1e-6 * a.s[0]
    gap = torch.diff(torch.linalg.svdvals(w.double())[:11]).abs().amin()
    bound = float((a.residual + b.residual) * a.s[0] / gap)  # sin of the angle: Davis-Kahan
    va, vb = a.vh.double(), b.vh.double()
    apart = (vb - (va * vb).sum(dim=1, keepdim=True) * va).norm(dim=1)
    assert bound < 1e-2
    assert apart.max() <= bound + 1e-6


def test_repetition_is_bitwise_and_global_state_untouched() -> None:
    w = torch.randn(300, 300, generator=torch.Generator().manual_seed(3))
    before = torch.get_rng_state(), torch.get_float32_matmul_precision()
    a, b = topk_svd(w, 5), topk_svd(w, 5)
    assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("u", "s", "vh", "residual"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == torch.get_float32_matmul_precision()


def test_projection_identity_on_the_short_side() -> None:
    """design section 3, F3: W V = U S for out > in, U^T W = S Vh for out < in, to rounding."""
    tall = with_spectrum(640, 300, slow_decay(300))
    a = topk_svd(tall, 16)
    assert (tall @ a.vh.mT - a.u * a.s).abs().max() < 1e-6
    b = topk_svd(tall.mT.contiguous(), 16)
    assert (b.u.mT @ tall.mT - b.s[:, None] * b.vh).abs().max() < 1e-6


def test_multiplicity_above_the_width() -> None:
    """A start block of b vectors finds b vectors of a value; that there are more must be noticed."""
    multiplicity, k = 20, 24
    assert krylov.block_width(k, 400, compiled=False) < multiplicity
    s = torch.cat([torch.full((multiplicity,), 2.0), torch.linspace(1, 0.1, 380)])
    w = with_spectrum(400, 400, s)
    check(w, topk_svd(w, k), k)


def test_float32_is_left_for_float64_where_rounding_forbids_tol() -> None:
    s = torch.cat([torch.tensor([300.0]), slow_decay(399)])
    w = with_spectrum(400, 400, s)
    check(w, topk_svd(w, 24), 24)


def test_step_limit_warns_and_reports() -> None:
    w = torch.randn(2, 400, 400, generator=torch.Generator().manual_seed(0))
    with pytest.warns(ConvergenceWarning, match=r"2 of 2 matrices .* in layer\.[01]"):
        found = topk_svd(w, 8, max_steps=3, names=["layer.0", "layer.1"])
    assert not found.converged.any()
    assert (found.residual > 1e-5).all()
    for i in range(2):
        one = TopkSVD(found.u[i], found.s[i], found.vh[i], found.residual[i], found.converged[i])
        assert worst_residual(w[i], one) == pytest.approx(float(one.residual), rel=1e-2)


def test_stricter_tolerance_is_met() -> None:
    w = with_spectrum(300, 300, slow_decay(300), dtype=torch.float64)
    assert worst_residual(w, topk_svd(w, 6, tol=1e-9)) <= 1e-9


def test_gradients_and_modes_of_the_caller_do_not_matter() -> None:
    w = torch.nn.Parameter(torch.randn(300, 290, generator=torch.Generator().manual_seed(0)))
    plain = topk_svd(w.detach(), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = topk_svd(w, 4)
    with torch.inference_mode():
        inferred = topk_svd(w, 4)
    assert not cast.u.requires_grad
    assert torch.equal(plain.u, cast.u)
    assert torch.equal(plain.u, inferred.u)


ERRORS = [
    (lambda: topk_svd(torch.randn(4, 4), 5), ValueError, r"k must lie between 1 and 4"),
    (lambda: topk_svd(torch.randn(4, 4), 0), ValueError, r"k must lie between 1 and 4"),
    (lambda: topk_svd(torch.randn(4, 4), 2.0), TypeError, "k must be an int"),
    (lambda: topk_svd(torch.randn(4, 4), True), TypeError, "k must be an integer"),
    (lambda: topk_svd(torch.randn(2, 4, 4), [1, 2]), TypeError, "k must be an int for a matrix"),
    (lambda: topk_svd([torch.randn(4, 4)], [1, 2]), ValueError, "one count per matrix"),
    (lambda: topk_svd(torch.randn(4), 1), ValueError, "a tensor of shape"),
    (lambda: topk_svd([torch.randn(4)], 1), ValueError, r"weights\[0\] must be a matrix"),
    (lambda: topk_svd(torch.randn(0, 4), 1), ValueError, "weights is empty"),
    (lambda: topk_svd(torch.randn(0, 4, 4), 1), ValueError, "empty stack"),
    (lambda: topk_svd(torch.ones(4, 4, dtype=torch.int8), 1), TypeError, "torch.int8"),
    (lambda: topk_svd(torch.ones(4, 4, dtype=torch.cfloat), 1), TypeError, "complex64"),
    (lambda: topk_svd(torch.randn(4, 4, device="meta"), 1), ValueError, "meta device"),
    (lambda: topk_svd([[1.0]], 1), TypeError, "must be a tensor, got list"),
    (lambda: topk_svd(torch.randn(4, 4), 1, tol=0.0), ValueError, "tol must lie"),
    (lambda: topk_svd(torch.randn(4, 4), 1, max_steps=0), ValueError, "max_steps"),
    (lambda: topk_svd(torch.randn(4, 4), 1, workspace=0), ValueError, "workspace"),
    (lambda: topk_svd(torch.randn(4, 4), 1, dtype=torch.int8), TypeError, "dtype must be"),
    (lambda: topk_svd(torch.randn(4, 4), 1, names=["a", "b"]), ValueError, "one name per matrix"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[e[2] for e in ERRORS])
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_quantised_weights_are_refused() -> None:
    quantised = torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match="dequantise"):
        topk_svd(quantised, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_names_the_matrix(bad: float) -> None:
    good, broken = torch.randn(6, 5), torch.randn(6, 5)
    broken[3, 2] = bad
    with pytest.raises(ValueError, match=r"non-finite values in encoder\.1"):
        topk_svd([good, broken], 2, names=["encoder.0", "encoder.1"])


def test_empty_list() -> None:
    assert topk_svd([], 3) == []


def test_results_own_their_memory() -> None:
    found = topk_svd([torch.randn(30, 20) for _ in range(3)], 2)
    for one in found:
        for tensor in (one.u, one.s, one.vh):
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_progress_is_silent_unless_asked(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    topk_svd(torch.randn(5, 8, 8), 2)
    assert terminal.getvalue() == ""
    topk_svd(torch.randn(5, 8, 8), 2, progress=True)
    assert "matrix" in terminal.getvalue()


def check_any(
    shape: tuple[int, int], spectrum: str, dtype: torch.dtype, k: int, seed: int, **options: int
) -> None:
    """`check` of a matrix as `dtype` rounds it; what is narrower than float32 asks for float32 back."""
    w = with_spectrum(*shape, SPECTRA[spectrum](min(shape)), seed, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        check(w, topk_svd(w, k, seed=seed, dtype=wide, **options), k)


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],  # the same for every example
    )


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 10**6)
NAMES = st.sampled_from(sorted(SPECTRA))


@examples(60)
@given(
    m=st.integers(1, 320),
    n=st.integers(1, 320),
    share=st.floats(0, 1),
    spectrum=NAMES,
    dtype=DTYPES,
    seed=SEEDS,
)
def test_any_matrix(
    m: int, n: int, share: float, spectrum: str, dtype: torch.dtype, seed: int
) -> None:
    # small k oftener, which is where iterating is chosen
    k = max(1, round(share**3 * min(m, n)))
    check_any((m, n), spectrum, dtype, k, seed)


@examples(30)
@given(
    short=st.integers(260, 420),
    extra=st.integers(0, 200),
    wide=st.booleans(),
    k=st.integers(1, 16),
    spectrum=NAMES,
    dtype=DTYPES,
    seed=SEEDS,
)
def test_any_matrix_large_enough_to_iterate(
    short: int, extra: int, wide: bool, k: int, spectrum: str, dtype: torch.dtype, seed: int
) -> None:
    assert krylov.worthwhile(k, short)
    shape = (short, short + extra) if wide else (short + extra, short)
    check_any(shape, spectrum, dtype, k, seed)


@examples(16)
@given(
    short=st.integers(530, 600),
    k=st.integers(17, 60),
    spectrum=NAMES,
    dtype=DTYPES,
    seed=SEEDS,
)
def test_any_matrix_with_so_little_memory_that_the_iteration_restarts(
    short: int, k: int, spectrum: str, dtype: torch.dtype, seed: int
) -> None:
    assert krylov.worthwhile(k, short)
    check_any((short + 20, short), spectrum, dtype, k, seed, workspace=1)


def test_a_failure_of_lapack_names_the_layers(monkeypatch) -> None:
    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("matrix 1 of the stack: no convergence")

    monkeypatch.setattr("fastspec.svd.topk._leading_triplets", fails)
    stack = [torch.randn(4, 4)] * 2
    with pytest.raises(torch.linalg.LinAlgError, match=r"encoder.0 .. encoder.1: matrix 1 of"):
        topk_svd(stack, 2, names=["encoder.0", "encoder.1"])
