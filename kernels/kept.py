"""One layer's copy of W + U C Vh, made again on the device only where the coefficients have changed.

The launch compares the coefficients with those the copy was made for and ends where they are equal, so
nothing waits for a look at them, and a CUDA graph holds the comparison too. In 16 bits the sum is rounded
up or down by each entry's own fixed threshold (`fastspec.ops.kept`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastspec.kernels import arrival, tiles
from fastspec.kernels.launch import launch
from fastspec.kernels.sigma_grad import rank_tile

AT_ONCE = 1024  # coefficients compared at once
TILE = tiles.Tile(64, 128, 32, 8, 2)  # bound by memory, as `merge`


# fmt: off
@triton.jit
def round_by_threshold(value, index, DTYPE: tl.constexpr):
    """float32 to 16 bits: up where what lies beyond the last bit exceeds the threshold, else down.

    The threshold of an index is a hash of it: `lowbias32` (https://nullprogram.com/blog/2018/07/31/).
    """
    h = index.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    beyond: tl.constexpr = 0x1FFF if DTYPE == tl.float16 else 0xFFFF  # noqa: SIM300  bits it has not
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + (h & beyond)) & (0xFFFFFFFF ^ beyond)).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), rounded, value).to(DTYPE)


@triton.jit
def keep_kernel(
    w_ptr,            # [OUT, IN]
    u_ptr,            # [OUT, K]
    vh_ptr,           # [K, IN]
    delta_ptr,        # float32 contiguous: [K] or [K, K]
    made_for_ptr,     # the same, of the copy as it is
    out_ptr,          # [OUT, IN], the copy
    arrived_ptr,      # int32, zero before and after
    forced,           # int: not 0 to make it in any case
    OUT, IN, K, cells,
    stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi, stride_oo, stride_oi,
    CORE: tl.constexpr, CELLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """out = W + U C Vh, unless it was made for this C already; then made_for = C."""
    cell = tl.arange(0, CELLS)
    differing = tl.zeros([CELLS], dtype=tl.int32)
    for c in range(0, cells, CELLS):
        ok = cell < cells - c
        now = tl.load(delta_ptr + c + cell, mask=ok, other=0.0)
        differing += (now != tl.load(made_for_ptr + c + cell, mask=ok, other=0.0)).to(tl.int32)
    if tl.sum(differing) + forced > 0:  # alike in every program: the last one alone changes made_for
        dtype: tl.constexpr = w_ptr.dtype.element_ty
        rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        ranks = tl.arange(0, BLOCK_R)
        row_ok = (rows < OUT)[:, None]
        col_ok = (cols < IN)[None, :]
        shift = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for r in range(0, K, BLOCK_R):
            r_ok = ranks < K - r
            vh_ptrs = vh_ptr + (r + ranks)[:, None] * stride_vk + cols[None, :] * stride_vi
            vh = tl.load(vh_ptrs, mask=r_ok[:, None] & col_ok, other=0.0)
            if CORE == "diag":
                u_ptrs = u_ptr + rows[:, None] * stride_uo + (r + ranks)[None, :] * stride_uk
                u = tl.load(u_ptrs, mask=row_ok & r_ok[None, :], other=0.0).to(tl.float32)
                left = u * tl.load(delta_ptr + r + ranks, mask=r_ok, other=0.0)[None, :]
            else:  # the columns r of U C
                left = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
                for s in range(0, K, BLOCK_R):
                    s_ok = ranks < K - s
                    u_ptrs = u_ptr + rows[:, None] * stride_uo + (s + ranks)[None, :] * stride_uk
                    u = tl.load(u_ptrs, mask=row_ok & s_ok[None, :], other=0.0)
                    core_ptrs = delta_ptr + (s + ranks)[:, None] * K + (r + ranks)[None, :]
                    core = tl.load(core_ptrs, mask=s_ok[:, None] & r_ok[None, :], other=0.0)
                    left = tl.dot(u, core.to(dtype), left, input_precision="ieee")
            shift = tl.dot(left.to(dtype), vh, shift, input_precision="ieee")
        w_ptrs = w_ptr + rows[:, None] * stride_wo + cols[None, :] * stride_wi
        w = tl.load(w_ptrs, mask=row_ok & col_ok, other=0.0).to(tl.float32)
        index = rows[:, None] * IN + cols[None, :]
        out_ptrs = out_ptr + rows[:, None] * stride_oo + cols[None, :] * stride_oi
        tl.store(out_ptrs, round_by_threshold(w + shift, index, dtype), mask=row_ok & col_ok)
        tl.debug_barrier()  # everybody here has compared before one of us says so
        programs = tl.num_programs(0) * tl.num_programs(1)
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1:
            for c in range(0, cells, CELLS):
                ok = cell < cells - c
                now = tl.load(delta_ptr + c + cell, mask=ok, other=0.0)
                tl.store(made_for_ptr + c + cell, now, mask=ok)
            tl.store(arrived_ptr, 0)
# fmt: on


def keep(
    out: Tensor,  # [out, in], the copy
    made_for: Tensor,  # as delta
    weight: Tensor,  # [out, in]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    delta: Tensor,  # [k] or [k, k] float32
    core: str,
    forced: bool,
) -> None:
    """Let `out` hold W + U C Vh and `made_for` the delta it was made for."""
    arrived = arrival.counter(weight.device)
    assert arrived is not None, "nothing traces through this operator"
    (rows, columns), k = weight.shape, u.shape[1]
    grid = (tiles.cdiv(rows, TILE.block_m), tiles.cdiv(columns, TILE.block_n))
    launch(
        keep_kernel, grid,
        w_ptr=weight, u_ptr=u, vh_ptr=vh, delta_ptr=delta.contiguous(), made_for_ptr=made_for,
        out_ptr=out, arrived_ptr=arrived, forced=int(forced), OUT=rows, IN=columns, K=k, cells=delta.numel(),
        stride_wo=weight.stride(0), stride_wi=weight.stride(1), stride_uo=u.stride(0),
        stride_uk=u.stride(1), stride_vk=vh.stride(0), stride_vi=vh.stride(1),
        stride_oo=out.stride(0), stride_oi=out.stride(1),
        CORE=core, CELLS=AT_ONCE, BLOCK_M=TILE.block_m, BLOCK_N=TILE.block_n,
        BLOCK_R=min(rank_tile(k), 32), **TILE.options,
    )  # fmt: skip
