"""The coefficient gradient in one launch, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_sanitizer import sanitized
from support import assert_close

from fastspec.kernels import arrival, reduce

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, k, generator=gen).to(dtype) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (300, 32), (257, 13), (70, 200)], ids=str)
def test_column_sums(size, dtype):
    q, p = problem(*size, dtype)
    with sanitized() as watch:
        got = reduce.reduce_diagonal(watch.guard(q), p)  # guarded: rows that lie apart
    assert got.dtype == torch.float32
    # sums in float32 whatever the operands' dtype
    assert_close(got, (q.double() * p.double()).sum(0), torch.float32)


def test_operands_of_two_dtypes():
    q, _ = problem(90, 24, torch.bfloat16)
    _, p = problem(90, 24, torch.float32)
    with sanitized():
        got = reduce.reduce_diagonal(q, p)
    assert_close(got, (q.double() * p.double()).sum(0), torch.float32)


def test_many_rows_are_more_steps_of_no_more_programs(monkeypatch):
    monkeypatch.setattr(reduce, "MOST_PROGRAMS", 4)
    monkeypatch.setattr(reduce, "AT_ONCE", 64)
    q, p = problem(555, 8, torch.float32)
    with sanitized():
        got = reduce.reduce_diagonal(q, p)
        assert torch.equal(got, reduce.reduce_diagonal(q, p))
    assert_close(got, (q.double() * p.double()).sum(0), torch.float32)


def test_a_counter_is_left_at_zero():
    q, p = problem(300, 32, torch.float32)
    with sanitized():
        reduce.reduce_diagonal(q, p)
    assert not arrival._counters[q.device].memory.any()


def test_what_the_kernel_leaves_to_aten(monkeypatch):
    q, p = problem(4, 8, torch.float32)
    assert reduce.serves(q, p)
    assert not reduce.serves(q.double(), p)
    assert not reduce.serves(q.expand(1, 4, 8)[0, :, :1].expand(4, 300), p)
    monkeypatch.setenv("FASTSPEC_BACKEND", "aten")
    assert not reduce.serves(q, p)
