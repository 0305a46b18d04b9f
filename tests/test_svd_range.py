"""topk_svd certifies what it returns: at the ends of every range, and for vectors narrower than the input."""

from __future__ import annotations

import warnings

import pytest
import torch
from svd_support import (  # noqa: F401 - a fixture
    implementation,
    ldexp,
    slow_decay,
    with_spectrum,
    worst_residual,
)
from torch import Tensor

from fastspec.svd.topk import ConvergenceWarning, TopkSVD, topk_svd

SHAPES = [(30, 20), (20, 30), (280, 270)]  # the last is iterated on
POWERS = {
    torch.float64: [-1073, -1070, -1060, -1050, -1022, -600, 600, 1000, 1022],
    torch.float32: [-148, -146, -140, -130, -126, -60, 60, 120, 126],
    torch.bfloat16: [-132, -128, -120, -60, 60, 120, 126],
    torch.float16: [-23, -20, -14, 13],
}


def scaled(shape: tuple[int, int], dtype: torch.dtype, power: int) -> Tensor:
    """A matrix of norm 2^power, as `dtype` rounds it."""
    w = with_spectrum(*shape, slow_decay(min(shape)), dtype=torch.float64)
    return ldexp(w, power).to(dtype)


def quietly(*args, **options) -> TopkSVD:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return topk_svd(*args, **options)


def check_honest(w: Tensor, found: TopkSVD, tol: float = 1e-5) -> None:
    for t in (found.u, found.s, found.vh):
        assert torch.isfinite(t).all()
    measured = worst_residual(w, found)
    assert measured == pytest.approx(float(found.residual), rel=0.05, abs=2e-6)
    assert bool(found.converged) == (float(found.residual) <= tol)
    if found.converged:
        assert measured <= 1.05 * tol
    k = len(found.s)
    eye = torch.eye(k, dtype=torch.float64)
    assert (found.u.double().mT @ found.u.double() - eye).abs().max() <= 1e-5
    assert (found.vh.double() @ found.vh.double().mT - eye).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "power"), [(d, p) for d, ps in POWERS.items() for p in ps])
def test_the_ends_of_the_range(dtype: torch.dtype, power: int, shape: tuple[int, int]) -> None:
    w = scaled(shape, dtype, power)
    wide = torch.promote_types(dtype, torch.float32)
    found = quietly(w, 4, dtype=wide)
    if bool((w != 0).any()):
        check_honest(w, found)
    smallest = torch.finfo(wide).smallest_normal
    if float(w.double().norm()) * 2.0**-8 > 2 * smallest:
        assert found.converged


@pytest.mark.parametrize("dtype", POWERS)
def test_a_stack_of_all_sizes_is_as_good_as_each_alone(dtype: torch.dtype) -> None:
    powers = POWERS[dtype]
    matrices = [scaled((40, 30), dtype, p) for p in powers] + [torch.zeros(40, 30, dtype=dtype)]
    wide = torch.promote_types(dtype, torch.float32)
    stack = quietly(torch.stack(matrices), 5, dtype=wide)
    listed = quietly(matrices, 5, dtype=wide)
    for i, w in enumerate(matrices):
        one = TopkSVD(stack.u[i], stack.s[i], stack.vh[i], stack.residual[i], stack.converged[i])
        if bool((w != 0).any()):
            check_honest(w, one)
        else:
            assert bool(one.converged)
            assert not one.s.any()
        assert torch.equal(one.s, listed[i].s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_that_their_dtype_can_not_hold_exactly_are_not_certified(dtype) -> None:
    w = scaled((30, 20), dtype, POWERS[dtype][1])
    with pytest.warns(ConvergenceWarning, match="scale it up by a power of two"):
        found = topk_svd(w, 4)
    assert not found.converged
    assert float(found.residual) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_singular_values_beyond_the_range_are_refused_by_name(dtype: torch.dtype) -> None:
    good, large = torch.ones(8, 8, dtype=dtype), torch.full((8, 8), 0.5, dtype=dtype)
    large *= torch.finfo(dtype).max
    with pytest.raises(ValueError, match=r"singular value of encoder\.1 .* power of two"):
        topk_svd([good, large], 2, names=["encoder.0", "encoder.1"])
    if dtype != torch.float64:
        assert topk_svd(large.double(), 2, dtype=dtype).converged


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tol", [1e-5, 1e-6, 2e-7, 1e-7, 4e-8, 1e-9])
@pytest.mark.parametrize("spectrum", ["slow", "steep"])
def test_float64_matrices_with_float32_vectors(shape, tol: float, spectrum: str) -> None:
    short = min(shape)
    s = slow_decay(short) if spectrum == "slow" else 0.7 ** torch.arange(short).double()
    w = with_spectrum(*shape, s, dtype=torch.float64)
    found = quietly(w, 12, tol=tol, dtype=torch.float32)
    assert found.u.dtype == found.vh.dtype == torch.float32
    assert worst_residual(w, found) == pytest.approx(float(found.residual), rel=1e-3)
    assert bool(found.converged) == (float(found.residual) <= tol)
    if tol >= 1e-5:
        assert found.converged
    narrow = quietly(w, 12, tol=tol, dtype=torch.bfloat16)
    assert torch.equal(narrow.vh, found.vh.bfloat16())
    assert torch.equal(narrow.residual, found.residual)
