"""The tile program with TMA, the Tensor Memory Accelerator of sm_90 on, which fetches whole tiles.

Same mathematics, names and outputs as `spectral_linear`; what differs is that A, B, V and C arrive by
TMA: one thread issues a tile, addresses and masks take no registers, and rows or columns outside the
tensor read as zero. TMA asks for row-major tensors whose rows start on 16 bytes; `fits` says whether the
operands are such, and the plain kernels take the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastspec.kernels import tiles
from fastspec.kernels.launch import launch
from fastspec.kernels.sigma_grad import (
    dot_precision,
    finish_gradient,
    gradient_slots,
    reduce_gradient,
)
from fastspec.kernels.spectral_linear import absent, fuses, kernel_core, launch_grid
from fastspec.kernels.tile_program import apply_core

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton below 3.4
    TensorDescriptor = None
AVAILABLE = TensorDescriptor is not None

# ----------------------------------------------------------------------------------------- kernels


# fmt: off
@triton.jit
def spectral_linear_fwd_tma_kernel(
    x_desc,           # [N, IN] in tiles [BLOCK_M, BLOCK_K]
    w_desc,           # [OUT, IN] in tiles [BLOCK_N, BLOCK_K]
    u_desc,           # [OUT, K] in tiles [BLOCK_N, BLOCK_R]
    vh_desc,          # [K, IN] in tiles [BLOCK_R, BLOCK_K]
    y_desc,           # [N, OUT] in tiles [BLOCK_M, BLOCK_N]
    bias_ptr, delta_ptr, task_ptr, p_ptr,  # as in the plain kernel
    N, IN, OUT, K, TASKS, tiles_each,
    CORE: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y = x W^T + b + core(p) U^T  with  p = x Vh^T, which is stored."""
    dtype: tl.constexpr = p_ptr.dtype.element_ty
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M
    row0 = row.to(tl.int64)
    row_ok = tl.arange(0, BLOCK_M) < N - row0
    rank_ok = tl.arange(0, BLOCK_R) < K
    scaled = tl.zeros([BLOCK_M, BLOCK_R], dtype=dtype)
    first = split * tiles_each
    last = min(first + tiles_each, tl.cdiv(OUT, BLOCK_N))
    for tile in range(first, last):
        col = tile * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if tile == first:
            p = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
            for d in range(0, IN, BLOCK_K):
                x = x_desc.load([row, d])
                acc = tl.dot(x, w_desc.load([col, d]).T, acc, input_precision=PRECISION)
                p = tl.dot(x, vh_desc.load([0, d]).T, p, input_precision=PRECISION)
            if split == 0:
                cell = tl.arange(0, BLOCK_M)[:, None] * K + tl.arange(0, BLOCK_R)[None, :]
                p_ok = row_ok[:, None] & rank_ok[None, :]
                tl.store(p_ptr + row0 * K + cell, p.to(dtype), mask=p_ok)
            scaled = apply_core(
                p, delta_ptr, task_ptr, row0=row0, row_ok=row_ok, rank_ok=rank_ok, K=K, TASKS=TASKS,
                CORE=CORE, FORWARD=True, PRECISION=PRECISION, DTYPE=dtype,
            )
        else:
            for d in range(0, IN, BLOCK_K):
                x = x_desc.load([row, d])
                acc = tl.dot(x, w_desc.load([col, d]).T, acc, input_precision=PRECISION)
        acc = tl.dot(scaled, u_desc.load([col, 0]).T, acc, input_precision=PRECISION)
        if BIAS:
            cols = col + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + cols, mask=cols < OUT, other=0.0).to(tl.float32)[None, :]
        y_desc.store([row, col], acc.to(dtype))


@triton.jit
def spectral_linear_bwd_tma_kernel(
    g_desc,           # [N, OUT] in tiles [BLOCK_M, BLOCK_K]
    w_desc,           # [OUT, IN] in tiles [BLOCK_K, BLOCK_N]
    u_desc,           # [OUT, K] in tiles [BLOCK_K, BLOCK_R]
    vh_desc,          # [K, IN] in tiles [BLOCK_R, BLOCK_N]
    dx_desc,          # [N, IN] in tiles [BLOCK_M, BLOCK_N]
    p_ptr, delta_ptr, task_ptr, grad_ptr,  # as in the plain kernel
    N, IN, OUT, K, TASKS, tiles_each,
    CORE: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dx = g W + core(q) Vh  with  q = g U, and from q and p the row tile's share of d delta."""
    dtype: tl.constexpr = p_ptr.dtype.element_ty
    slot = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M
    row0 = row.to(tl.int64)
    row_ok = tl.arange(0, BLOCK_M) < N - row0
    rank_ok = tl.arange(0, BLOCK_R) < K
    scaled = tl.zeros([BLOCK_M, BLOCK_R], dtype=dtype)
    first = split * tiles_each
    last = min(first + tiles_each, tl.cdiv(IN, BLOCK_N))
    for tile in range(first, last):
        col = tile * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if tile == first:
            q = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
            for d in range(0, OUT, BLOCK_K):
                g = g_desc.load([row, d])
                acc = tl.dot(g, w_desc.load([d, col]), acc, input_precision=PRECISION)
                q = tl.dot(g, u_desc.load([d, 0]), q, input_precision=PRECISION)
            if GRAD and split == 0:
                reduce_gradient(
                    q, p_ptr, grad_ptr, slot=slot, row0=row0, row_ok=row_ok, rank0=0, rank_ok=rank_ok,
                    K=K, CORE=CORE, PRECISION=PRECISION,
                )
            scaled = apply_core(
                q, delta_ptr, task_ptr, row0=row0, row_ok=row_ok, rank_ok=rank_ok, K=K, TASKS=TASKS,
                CORE=CORE, FORWARD=False, PRECISION=PRECISION, DTYPE=dtype,
            )
        else:
            for d in range(0, OUT, BLOCK_K):
                g = g_desc.load([row, d])
                acc = tl.dot(g, w_desc.load([d, col]), acc, input_precision=PRECISION)
        acc = tl.dot(scaled, vh_desc.load([0, col]), acc, input_precision=PRECISION)
        dx_desc.store([row, col], acc.to(dtype))
# fmt: on


# --------------------------------------------------------------------------------------- launchers


def fits(*operands: Tensor) -> bool:
    """Whether TMA can address these matrices.

    Row-major, at least one element, rows and base on 16 bytes.
    """
    return all(
        t.numel() > 0
        and t.stride(1) == 1
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in operands
    )


def spectral_linear_fwd(
    x: Tensor,  # [N, in]
    w: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    delta: Tensor,
    core: str = "diag",
    task: Tensor | None = None,  # [N]
    *,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor]:  # [N, out], [N, k]
    """As `spectral_linear.spectral_linear_fwd`, where `fuses` and `fits` hold."""
    name, table = kernel_core(x, u, delta, core, task)
    (n, d), (out, k) = x.shape, u.shape
    y = torch.empty(n, out, dtype=x.dtype, device=x.device)
    p = torch.empty(n, k, dtype=x.dtype, device=x.device)
    block_r, tile, grid, tiles_each = launch_grid(x, n, out, k, tile)
    m, c, s = tile.block_m, tile.block_n, tile.block_k
    _check(x, w, u, vh, y)
    launch(
        spectral_linear_fwd_tma_kernel, grid,
        x_desc=_descriptor(x, m, s), w_desc=_descriptor(w, c, s), u_desc=_descriptor(u, c, block_r),
        vh_desc=_descriptor(vh, block_r, s), y_desc=_descriptor(y, m, c),
        bias_ptr=absent(bias, x), delta_ptr=table, task_ptr=absent(task, x), p_ptr=p,
        N=n, IN=d, OUT=out, K=k, TASKS=len(table), tiles_each=tiles_each,
        CORE=name, BIAS=bias is not None, PRECISION=dot_precision(x.dtype),
        **tile.blocks(block_r), **tile.options,
    )  # fmt: skip
    return y, p


def spectral_linear_bwd(
    g: Tensor,  # [N, out], dL/dy
    p: Tensor,  # [N, k]
    w: Tensor,  # [out, in]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    delta: Tensor,
    core: str = "diag",
    task: Tensor | None = None,  # [N]
    *,
    needs_delta: bool = True,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor | None]:  # [N, in], the shape of delta
    """As `spectral_linear.spectral_linear_bwd` with dx wanted, where `fuses` and `fits` hold."""
    name, table = kernel_core(g, u, delta, core, task)
    (n, out), (k, d) = g.shape, vh.shape
    dx = torch.empty(n, d, dtype=g.dtype, device=g.device)
    block_r, tile, grid, tiles_each = launch_grid(g, n, d, k, tile)
    m, c, s = tile.block_m, tile.block_n, tile.block_k
    shares = gradient_slots(name, grid[0], n, k, g.device) if needs_delta else table
    _check(g, w, u, vh, dx)
    launch(
        spectral_linear_bwd_tma_kernel, grid,
        g_desc=_descriptor(g, m, s), w_desc=_descriptor(w, s, c), u_desc=_descriptor(u, s, block_r),
        vh_desc=_descriptor(vh, block_r, c), dx_desc=_descriptor(dx, m, c),
        p_ptr=p, delta_ptr=table, task_ptr=absent(task, g), grad_ptr=shares,
        N=n, IN=d, OUT=out, K=k, TASKS=len(table), tiles_each=tiles_each,
        CORE=name, GRAD=needs_delta, PRECISION=dot_precision(g.dtype),
        **tile.blocks(block_r), **tile.options,
    )  # fmt: skip
    if not needs_delta:
        return dx, None
    n_tasks = len(delta) if task is not None else None
    return dx, finish_gradient(shares, core, task, n_tasks, delta.shape[0] // 2)


def _check(*operands: Tensor) -> None:
    if not fits(*operands):
        raise ValueError(
            "TMA needs row-major operands with rows on 16 bytes, "
            f"got {[(tuple(t.shape), t.stride()) for t in operands]}; use the plain kernels"
        )
    if not fuses(operands[0], operands[2].shape[1]):
        raise ValueError(
            f"k must be at most {tiles.FUSED_RANK} for these kernels, got {operands[2].shape[1]} in "
            f"{operands[0].dtype}; use the plain ones"
        )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What TMA needs to know of a matrix to fetch or store it in tiles [rows, columns]."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns])
