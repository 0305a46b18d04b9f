"""The compiled thin products against float64, on sizes around every tile edge."""

import pytest
import torch
from support import assert_close

from fastspec import _extension, aten

pytestmark = pytest.mark.skipif(
    not _extension.has_thin_products(),
    reason=f"no compiled part: {_extension.unavailable_reason()}",
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
        wide = torch.randn(n, d + 5)
        assert_close(
            aten.project(wide[:, 2 : d + 2], basis), wide[:, 2 : d + 2].double() @ basis.double()
        )


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("k", RANKS)
def test_merge(rows, k):
    for cols in (1, 15, 16, 63, 64, 65, 130):
        w, left, right = torch.randn(rows, cols), torch.randn(rows, k), torch.randn(k, cols)
        out = torch.full_like(w, float("nan"))
        torch.ops.fastspec.thin_merge(w, left, right, out)
        assert_close(out, w.double() + left.double() @ right.double())


def test_nothing_outside_the_result_is_written():
    frame = torch.full((20, 100), float("nan"))
    w, left, right = torch.randn(14, 70), torch.randn(14, 5), torch.randn(5, 70)
    torch.ops.fastspec.thin_merge(w, left, right, frame[3:17, 10:80])
    assert not frame[3:17, 10:80].isnan().any()
    frame[3:17, 10:80] = float("nan")
    assert frame.isnan().all()


def test_the_fast_path_uses_them_and_agrees_without_them(monkeypatch):
    x, basis = torch.randn(30, 40), torch.randn(40, 8)
    calls = []
    original = torch.ops.fastspec.thin_project
    monkeypatch.setattr(
        torch.ops.fastspec, "thin_project", lambda *a: calls.append(1) or original(*a)
    )
    with_them = aten.project(x, basis)
    assert calls
    monkeypatch.setattr(_extension, "has_thin_products", lambda: False)
    assert_close(aten.project(x, basis), with_them)
    assert len(calls) == 1


def test_wrong_operands_are_refused():
    with pytest.raises(RuntimeError, match="expected float32"):
        torch.ops.fastspec.thin_project(torch.randn(3, 4).double(), torch.randn(4, 2).double())
    with pytest.raises(RuntimeError, match="basis"):
        torch.ops.fastspec.thin_project(torch.randn(3, 4), torch.randn(5, 2))
    with pytest.raises(RuntimeError, match="thin_merge"):
        torch.ops.fastspec.thin_merge(*(torch.randn(3, 4) for _ in range(4)))
