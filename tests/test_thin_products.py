"""The compiled thin products against float64, on sizes around every tile edge."""

import pytest
import torch
from support import assert_close

from fastspec import _extension

pytestmark = pytest.mark.skipif(
    not _extension.has_thin_products(),
    reason=f"no compiled part: {_extension.load()}",
)

needs_merge = pytest.mark.skipif(
    _extension.has_thin_products() and not torch.ops.fastspec.thin_merge_supported(),
    reason="on this processor a BLAS merges faster",
)

SIZES = [1, 2, 11, 12, 13, 25, 100]
RANKS = [1, 8, 15, 16, 17, 31, 32, 33, 47, 64]


@pytest.mark.parametrize("n", [0, *SIZES])
@pytest.mark.parametrize("k", RANKS)
def test_project(n, k):
    for d in (1, 3, 16, 65):
        x, basis = torch.randn(n, d), torch.randn(d, k)
        exact = x.double() @ basis.double()
        assert_close(torch.ops.fastspec.thin_project(x, basis), exact)
        assert_close(torch.ops.fastspec.thin_project(x, basis.mT.contiguous().mT), exact)
        inner = torch.randn(n, d + 5)[:, 2 : d + 2]
        assert_close(torch.ops.fastspec.thin_project(inner, basis), inner.double() @ basis.double())


@needs_merge
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("k", RANKS)
def test_merge(rows, k):
    for cols in (1, 15, 16, 63, 64, 65, 130):
        w, left, right = torch.randn(rows, cols), torch.randn(rows, k), torch.randn(k, cols)
        out = torch.full_like(w, float("nan"))
        torch.ops.fastspec.thin_merge(w, left, right, out)
        assert_close(out, w.double() + left.double() @ right.double())


@needs_merge
def test_nothing_outside_the_result_is_written():
    frame = torch.full((20, 100), float("nan"))
    w, left, right = torch.randn(14, 70), torch.randn(14, 5), torch.randn(5, 70)
    torch.ops.fastspec.thin_merge(w, left, right, frame[3:17, 10:80])
    assert not frame[3:17, 10:80].isnan().any()
    frame[3:17, 10:80] = float("nan")
    assert frame.isnan().all()


@pytest.mark.parametrize("n", [0, *SIZES, 500])
@pytest.mark.parametrize("k", RANKS)
def test_project_dot(n, k):
    """diag(P^T X B), and bitwise the same on any number of threads."""
    x, basis, wide = torch.randn(n, 40), torch.randn(40, k), torch.randn(n, k + 3)
    p = wide[:, :k]
    got = torch.ops.fastspec.thin_project_dot(x, basis, p)
    exact = ((x.double() @ basis.double()) * p.double()).sum(0)
    size = ((x.abs() @ basis.abs()) * p.abs()).sum(0)  # sums may cancel: relative to their terms
    assert bool(((got - exact).abs() <= 1e-6 * size).all())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(torch.ops.fastspec.thin_project_dot(x, basis, p), got)
    finally:
        torch.set_num_threads(threads)


def test_wrong_operands_are_refused():
    with pytest.raises(RuntimeError, match="expected float32"):
        torch.ops.fastspec.thin_project(torch.randn(3, 4).double(), torch.randn(4, 2).double())
    with pytest.raises(RuntimeError, match="basis"):
        torch.ops.fastspec.thin_project(torch.randn(3, 4), torch.randn(5, 2))
    with pytest.raises(RuntimeError, match=r"k <= 64"):
        torch.ops.fastspec.thin_project(torch.randn(3, 4), torch.randn(4, 65))
    with pytest.raises(RuntimeError, match=r"expected float32 p \[N, k\]"):
        torch.ops.fastspec.thin_project_dot(torch.randn(3, 4), torch.randn(4, 2), torch.randn(4, 2))
    with pytest.raises(RuntimeError, match="thin_merge"):  # checked first on every processor
        torch.ops.fastspec.thin_merge(*(torch.randn(3, 4) for _ in range(4)))
