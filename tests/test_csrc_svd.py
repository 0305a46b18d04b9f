"""The operators of csrc/ behind topk_svd, called directly."""

from __future__ import annotations

import pytest
import torch

from fastspec import _extension

pytestmark = pytest.mark.skipif(
    _extension.unavailable_reason() is not None, reason=str(_extension.unavailable_reason())
)


def subspace(w, k=4, tol=1e-5, floor=2**-8, max_steps=0, seed=0, width=4, gram_short=1024):
    return torch.ops.fastspec.leading_subspace(w, k, tol, floor, max_steps, seed, width, gram_short)


def sine(right: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Of the largest angle between `right [L, n, k]` and the exact leading right subspaces."""
    exact = torch.linalg.svd(w.double())[2][:, : right.shape[-1]].mT
    found = torch.linalg.qr(right.double())[0]
    return torch.linalg.matrix_norm(found - exact @ (exact.mT @ found), ord=2)


def allowed_sine(w: torch.Tensor, k: int, tol: float = 1e-5) -> torch.Tensor:
    """What a residual of `tol` in each of k eigenvectors of W^T W allows: Davis and Kahan."""
    values = torch.linalg.svdvals(w.double()) ** 2
    return k**0.5 * tol * values[:, 0] / (values[:, k - 1] - values[:, k])


@pytest.fixture
def stack() -> torch.Tensor:
    return torch.randn(5, 90, 70, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gram_short", [0, 1024], ids=["products", "gram"])
@pytest.mark.parametrize("width", [1, 3, 4, 16, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subspace(stack, gram_short: int, width: int, dtype: torch.dtype) -> None:
    w = stack.to(dtype)
    right = subspace(w, width=width, gram_short=gram_short)
    assert (sine(right, w) <= allowed_sine(w, 4)).all()


def test_a_matrix_gets_the_same_bits_in_any_stack(stack) -> None:
    whole = subspace(stack)
    assert torch.equal(whole, subspace(stack))
    reversed_ = subspace(stack.flip(0).contiguous()).flip(0)
    assert torch.equal(whole, reversed_)


def test_turned_and_strided_input(stack) -> None:
    turned = stack.mT.contiguous().mT
    assert (sine(subspace(turned), stack) <= allowed_sine(stack, 4)).all()


def test_step_limit_still_gives_k_vectors(stack) -> None:
    right = subspace(stack, k=20, max_steps=1)
    assert right.shape == (5, 70, 20)
    eye = torch.eye(20)
    assert (right.mT @ right - eye).abs().max() < 1e-5


def test_more_copies_than_columns() -> None:
    q = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    w = (q * torch.where(torch.arange(64) < 20, 2.0, 0.5)) @ q.mT
    assert sine(subspace(w[None], k=20, width=4), w[None]) <= allowed_sine(w[None], 20)


@pytest.mark.parametrize("n", [1, 2, 33, 130])
def test_eigenvectors(n: int) -> None:
    a = torch.randn(3, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    a = a + a.mT
    v = torch.ops.fastspec.eigenvectors(a)
    values = torch.linalg.eigvalsh(a)
    assert (a @ v - v * values[:, None, :]).abs().max() < 1e-12 * n
    assert (v.mT @ v - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-13 * n


ERRORS = {
    "must be a stack": lambda w: subspace(w[0]),
    "short side last": lambda w: subspace(w.mT),
    "k must lie between 1 and 70": lambda w: subspace(w, k=71),
    "width must be at least 1": lambda w: subspace(w, width=0),
    "must hold square matrices": lambda w: torch.ops.fastspec.eigenvectors(w),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(stack, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ERRORS[message](stack)


def test_wrong_dtype(stack) -> None:
    with pytest.raises(TypeError, match="must be float32 or float64"):
        subspace(stack.bfloat16())
