"""The SVD from Python on a CPU: parts of a stack, each on one of PyTorch's threads."""

import pytest
import torch

from fastspec.svd import topk_svd, workers
from fastspec.svd.triplets import Triplets


@pytest.fixture
def from_python(monkeypatch):
    monkeypatch.setattr("fastspec.svd.topk._extension.serves", lambda w: False)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_every_part_has_one_thread_and_no_gradient(threads):
    threads(3)
    seen = []

    def solve(w):
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), len(w)))
        s = w.sum((1, 2))[:, None]
        return Triplets(w, s, w, s[:, 0])

    w = torch.randn(5, 2, 1).expand(5, 2, workers.PART // 4).requires_grad_()
    found = workers.in_parts(solve, w)
    assert seen == [(1, False, 2), (1, False, 2), (1, False, 1)]
    assert torch.equal(found.left, w)
    assert torch.get_num_threads() == 3
    # a product of MKL uses what the thread has: the main thread has its number again
    assert (
        "mkl_get_max_threads() : 3" in torch.__config__.parallel_info()
        or not torch.backends.mkl.is_available()
    )


def test_the_result_does_not_depend_on_the_threads(from_python, threads, monkeypatch):
    monkeypatch.setattr(workers, "PART", 3 * 150 * 140)
    w = torch.randn(7, 150, 140)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(topk_svd(w, 4))
    for other in found[1:]:
        assert all(torch.equal(getattr(other, n), getattr(found[0], n)) for n in ("u", "s", "vh"))
    assert found[0].converged.all()


def test_an_error_in_a_part_comes_through(threads):
    threads(2)

    def fails(w):
        raise torch.linalg.LinAlgError("it did not converge")

    with pytest.raises(torch.linalg.LinAlgError, match="did not converge"):
        workers.in_parts(fails, torch.zeros(2, 3, 2))
    assert torch.get_num_threads() == 2
