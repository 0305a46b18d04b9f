"""The judge itself: gradients by gradcheck, formulas against each other."""

import pytest
import torch
from support import assert_close, singular_problem

from fastspec.cores import CORES, core_matrix, core_storage, delta_shape
from fastspec.ops import reference


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_gradcheck(core, k):
    p = singular_problem(7, 5, k, core=core, n=4, dtype=torch.float64)
    leaves = [p[n].requires_grad_() for n in ("x", "weight", "bias", "u", "vh", "delta")]
    assert torch.autograd.gradcheck(lambda *a: reference.spectral_linear(*a, core), leaves)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("k", [1, 2, 6])
def test_explicit_backward_is_autograds(core, k):
    p = singular_problem(9, 6, k, core=core, dtype=torch.float64)
    x, delta = p["x"].requires_grad_(), p["delta"].requires_grad_()
    y = reference.spectral_linear(x, p["weight"], p["bias"], p["u"], p["vh"], delta, core)
    y.backward(p["g"])
    dx, ddelta = reference.spectral_linear_backward(
        p["g"], x.detach(), p["weight"], p["u"], p["vh"], delta.detach(), core
    )
    assert_close(dx, x.grad)
    assert_close(ddelta, delta.grad)


@pytest.mark.parametrize("half_width", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_band_storage_round_trip(k, half_width):
    delta = torch.randn(delta_shape("band", k, half_width), dtype=torch.float64)
    c = core_matrix(delta, "band")
    i, j = torch.meshgrid(torch.arange(k), torch.arange(k), indexing="ij")
    assert (c[(i - j).abs() > half_width] == 0).all()
    for row in range(k):
        for col in range(max(0, row - half_width), min(k, row + half_width + 1)):
            assert c[row, col] == delta[half_width + col - row, row]
    again = core_matrix(core_storage(c, "band", half_width), "band")
    assert torch.equal(again, c)


def test_diagonal_shift_moves_the_singular_values():
    p = singular_problem(8, 6, 6, dtype=torch.float64)
    w = reference.effective_weight(p["weight"], p["u"], p["vh"], p["delta"])
    expected = (p["s"] + p["delta"]).abs().sort(descending=True).values
    assert_close(torch.linalg.svdvals(w), expected)
