"""A tile of W + U C Vh, which every kernel that writes merged weights computes."""

from __future__ import annotations

import triton
import triton.language as tl

from fastspec.kernels.sigma_grad import rounded
from fastspec.kernels.tile_program import through_registers


# fmt: off
@triton.jit
def shifted_tile(
    w_ptr,            # [OUT, IN]
    u_ptr,            # [OUT, K]
    vh_ptr,           # [K, IN]
    delta_ptr,        # float32 contiguous, [K] or [K, K]; not read where CORE is "none"
    rows, cols, row_ok, col_ok,  # the tile's, [BLOCK_M] and [BLOCK_N] int64; masks [BLOCK_M, 1], [1, BLOCK_N]
    K,
    stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi,
    CORE: tl.constexpr,  # "diag", "dense", or "none": U holds U C already
    PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N] of W + U C Vh, in the dtype of U up to the product with Vh."""
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    shift = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r in range(0, K, BLOCK_R):
        r_ok = ranks < K - r
        vh_ptrs = vh_ptr + (r + ranks)[:, None] * stride_vk + cols[None, :] * stride_vi
        vh = tl.load(vh_ptrs, mask=r_ok[:, None] & col_ok, other=0.0)  # [BLOCK_R, BLOCK_N]
        if CORE == "dense":  # the columns r of U C
            wide = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
            for s in range(0, K, BLOCK_R):
                s_ok = ranks < K - s
                u_ptrs = u_ptr + rows[:, None] * stride_uo + (s + ranks)[None, :] * stride_uk
                u = tl.load(u_ptrs, mask=row_ok & s_ok[None, :], other=0.0)
                core_ptrs = delta_ptr + (s + ranks)[:, None] * K + (r + ranks)[None, :]
                core = tl.load(core_ptrs, mask=s_ok[:, None] & r_ok[None, :], other=0.0)
                wide = tl.dot(u, core.to(dtype), wide, input_precision=PRECISION)
            left = wide.to(dtype)
        else:
            u_ptrs = u_ptr + rows[:, None] * stride_uo + (r + ranks)[None, :] * stride_uk
            left = tl.load(u_ptrs, mask=row_ok & r_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
            if CORE == "diag":
                delta = tl.load(delta_ptr + r + ranks, mask=r_ok, other=0.0)
                left = rounded((left.to(tl.float32) * delta[None, :]).to(dtype), PRECISION)
        shift = tl.dot(left, through_registers(vh, TRANSPOSED), shift, input_precision=PRECISION)
    w_ptrs = w_ptr + rows[:, None] * stride_wo + cols[None, :] * stride_wi
    w = tl.load(w_ptrs, mask=row_ok & col_ok, other=0.0)
    return w.to(tl.float32) + shift


@triton.jit
def at_address(table, layer, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer that lies in a table of int64; ALIGNED: to 16 bytes."""
    pointer = tl.load(table + layer).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer
# fmt: on
