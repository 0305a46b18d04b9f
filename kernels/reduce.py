"""The gradient of a diagonal core from both projections, in one launch:  d delta_i = sum_n q[n, i] p[n, i].

Tile programs make it beside dx. Where cuBLAS makes dx instead, ATen would start three kernels for it: q
widened, times p, summed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastspec.kernels import MAX_RANK, arrival, records, tiles
from fastspec.kernels.choice import PLANNED, forced_candidate
from fastspec.kernels.launch import launch, watched

AT_ONCE = 4096  # products that a program makes in a step: 32 registers a thread of 4 warps
MOST_PROGRAMS = 128  # the last one adds up the shares of all; more rows are more steps of each
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


# fmt: off
@triton.jit
def reduce_kernel(
    q_ptr,            # [N, K], rows of neighbours
    p_ptr,            # [N, K] contiguous
    shares_ptr,       # float32 [slots, K]
    grad_ptr,         # float32 [K]
    arrived_ptr,      # int32, zero before and after
    N, K, slots, steps,  # steps: BLOCK_M rows each, that one program walks
    stride_qn,
    CELLS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,  # CELLS: at least K
):
    """grad = sum over n of q[n] p[n], in float32: each program's rows, then the programs in their order."""
    slot = tl.program_id(0)
    cell = tl.arange(0, CELLS)
    first = slot.to(tl.int64) * steps * BLOCK_M
    total = tl.zeros([CELLS], dtype=tl.float32)
    for step in range(0, steps):
        rows = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        ok = (rows < N)[:, None] & (cell < K)[None, :]
        q = tl.load(q_ptr + rows[:, None] * stride_qn + cell[None, :], mask=ok, other=0.0)
        p = tl.load(p_ptr + rows[:, None] * K + cell[None, :], mask=ok, other=0.0)
        total += tl.sum(q.to(tl.float32) * p.to(tl.float32), axis=0)
    tl.store(shares_ptr + slot * K + cell, total, mask=cell < K)
    arrival.sum_shares(shares_ptr, grad_ptr, arrived_ptr, slots, K, CELLS, SLOTS)
# fmt: on


def reduce_diagonal(q: Tensor, p: Tensor) -> Tensor:
    """The column sums of q p.

    Args:
        q: [N, k], N > 0; rows of neighbours, which may lie apart.
        p: [N, k], contiguous.

    Returns:
        float32 [k], summed in float32, in the same order on every run.
    """
    n, k = q.shape
    blocks = arrival.blocks(k)
    blocks["SLOTS"] = min(blocks["SLOTS"], MOST_PROGRAMS)
    block_m = max(1, AT_ONCE // blocks["CELLS"])
    steps = tiles.cdiv(tiles.cdiv(n, block_m), MOST_PROGRAMS)
    slots = tiles.cdiv(n, block_m * steps)
    shares = torch.empty(slots, k, dtype=torch.float32, device=q.device)
    grad = torch.empty(k, dtype=torch.float32, device=q.device)
    arrived = arrival.counter(q.device)
    assert arrived is not None, "nothing traces through this operator"
    launch(
        reduce_kernel, (slots,),
        q_ptr=q, p_ptr=p, shares_ptr=shares, grad_ptr=grad, arrived_ptr=arrived,
        N=n, K=k, slots=slots, steps=steps, stride_qn=q.stride(0),
        **blocks, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip
    return grad


def serves(q: Tensor, p: Tensor) -> bool:
    """Whether the kernel may take them, and ATen's calls are not asked for."""
    return {q.dtype, p.dtype} <= DTYPES and q.shape[1] <= MAX_RANK and forced_candidate() != "aten"


def reduce_to_keep(q: Tensor, p: Tensor) -> tuple[Tensor, list[int]]:
    """`reduce_diagonal`, and what csrc/cuda_choices.h may remember of how it came."""
    with watched() as launches:
        grad = reduce_diagonal(q, p)
    kept = records.keep(launches, records.REDUCTION)
    return grad, [] if kept is None else [len(PLANNED), *kept]
