"""Projections onto the basis, and the coefficient gradient from them, without the layer's big product.

    q = g U,   d delta_i = sum_n q[n, i] p[n, i]   (diag)      dC = q^T p   (dense; band: its diagonals)

One kernel: a row tile times a chunk of the rank, over one part of the depth. The gradient is linear in
q, so parts of the depth are simply more partials and a thin projection still fills a device. Partials
are summed in a second, fixed order, so a second run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastspec.cores import core_storage
from fastspec.kernels import tiles
from fastspec.kernels.launch import launch, tracing

RANK_TILE = 64  # columns of a rank tile at most; more come in chunks

# ----------------------------------------------------------------------------------------- kernels


# fmt: off
@triton.jit
def rounded(t, PRECISION: tl.constexpr):
    """t to the nearest TF32 where the product will be in TF32, else t itself; for operands from registers.

    The matrix units cut the low 13 bits of a float32 off: each operand loses 3.4e-4 on average (2^-11 times
    the mean of 1/mantissa), always towards zero, and a chain of products adds that up. Rounding has no bias.
    """
    if PRECISION == "tf32":
        bits = t.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(t == t, nearest, t)  # the card's own NaN, 0x7fffffff, would be carried over to -0
    else:
        return t


@triton.jit
def reduce_gradient(
    q,                # [BLOCK_M, BLOCK_R] float32, the projection of the incoming gradient
    p_ptr,            # [N, K] contiguous, saved by the forward
    grad_ptr,         # float32; diag [slots, K], dense [slots, K, K], task [N, K]
    slot,             # where this tile's share goes
    row0,             # the tile's first row
    row_ok,           # [BLOCK_M]
    rank0,            # the tile's first direction
    rank_ok,          # [BLOCK_R]
    K,
    CORE: tl.constexpr, PRECISION: tl.constexpr,
):
    """sum_n q[n, i] p[n, i]  (diag), q[n, i] p[n, i]  (task) or q^T p  (dense) over this tile's rows n."""
    ranks = rank0 + tl.arange(0, q.shape[1])
    cell = row0 * K + tl.arange(0, q.shape[0])[:, None] * K + ranks[None, :]
    ok = row_ok[:, None] & rank_ok[None, :]
    p = tl.load(p_ptr + cell, mask=ok, other=0.0)  # [BLOCK_M, BLOCK_R]
    if CORE == "diag":
        share = tl.sum(q * p.to(tl.float32), axis=0)
        tl.store(grad_ptr + slot * K + ranks, share, mask=rank_ok)
    elif CORE == "task":
        tl.store(grad_ptr + cell, q * p.to(tl.float32), mask=ok)
    else:
        q = rounded(q.to(p.dtype), PRECISION)
        share = tl.dot(tl.trans(q), rounded(p, PRECISION), input_precision=PRECISION)
        place = ranks[:, None] * K + ranks[None, :]
        tl.store(grad_ptr + slot * K * K + place, share, mask=rank_ok[:, None] & rank_ok[None, :])


@triton.jit
def project_kernel(
    a_ptr,            # [N, D]: g or x
    v_ptr,            # [D, K]: U or Vh^T
    p_ptr,            # [N, K] contiguous; GRAD only
    out_ptr,          # STORE: the projection [N, K]; GRAD: as in `reduce_gradient`
    N, D, K, steps,   # steps: BLOCK_D steps of the depth that one program walks
    stride_an, stride_ad, stride_vd, stride_vk,
    CORE: tl.constexpr,  # "store", or the gradient's "diag", "task", "dense"
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """q = A V over one part of the depth: stored, or reduced with p to that part's share of d delta."""
    row_tile = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row0 = row_tile * BLOCK_M
    rank0 = tl.program_id(2) * BLOCK_R
    rows = row0 + tl.arange(0, BLOCK_M)
    ranks = rank0 + tl.arange(0, BLOCK_R)
    row_ok = rows < N
    rank_ok = ranks < K
    start = part * steps * BLOCK_D
    stop = min(D, start + steps * BLOCK_D)
    depth = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * stride_an + depth[None, :] * stride_ad
    v_ptrs = v_ptr + depth[:, None] * stride_vd + ranks[None, :].to(tl.int64) * stride_vk
    step = tl.full([], BLOCK_D, tl.int64)
    q = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for d in range(start, stop, BLOCK_D):
        d_ok = tl.arange(0, BLOCK_D) < stop - d
        a = tl.load(a_ptrs, mask=row_ok[:, None] & d_ok[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
        v = tl.load(v_ptrs, mask=d_ok[:, None] & rank_ok[None, :], other=0.0)  # [BLOCK_D, BLOCK_R]
        q = tl.dot(a, v, q, input_precision=PRECISION)
        a_ptrs += step * stride_ad
        v_ptrs += step * stride_vd
    if CORE == "store":
        ok = row_ok[:, None] & rank_ok[None, :]
        tl.store(out_ptr + rows[:, None] * K + ranks[None, :], q.to(a_ptr.dtype.element_ty), mask=ok)
    else:
        slot = row_tile * tl.num_programs(1) + part
        reduce_gradient(
            q, p_ptr, out_ptr, slot=slot, row0=row0, row_ok=row_ok, rank0=rank0, rank_ok=rank_ok,
            K=K, CORE=CORE, PRECISION=PRECISION,
        )


@triton.jit
def sum_by_task_kernel(
    shares_ptr,       # [N, K] float32
    order_ptr,        # [N] int64, rows sorted by task
    bounds_ptr,       # [T + 1] int64: task t has order[bounds[t]:bounds[t + 1]]
    grad_ptr,         # [T, K] float32
    K,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """grad[t, i] = sum of shares[n, i] over the rows n of task t, BLOCK_M of them at a time."""
    task = tl.program_id(0).to(tl.int64)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_ok = ranks < K
    first = tl.load(bounds_ptr + task)
    last = tl.load(bounds_ptr + task + 1)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    for n in range(first, last, BLOCK_M):
        places = n + tl.arange(0, BLOCK_M)
        row_ok = places < last
        rows = tl.load(order_ptr + places, mask=row_ok, other=0)
        ok = row_ok[:, None] & rank_ok[None, :]
        row_ptrs = shares_ptr + rows[:, None] * K
        share = tl.load(row_ptrs + ranks[None, :], mask=ok, other=0.0)  # [BLOCK_M, BLOCK_R]
        total += tl.sum(share, axis=0)
    tl.store(grad_ptr + task * K + ranks, total, mask=rank_ok)
# fmt: on


# --------------------------------------------------------------------------------------- launchers


def rank_tile(k: int) -> int:
    """Columns of the rank tile: a power of two, 16 being the matrix units' least."""
    return min(RANK_TILE, 1 << (max(16, int(k)) - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's name for the arithmetic of `tiles.kind`."""
    return "tf32" if tiles.kind(dtype) == "tf32" else "ieee"


def project(a: Tensor, v: Tensor, tile: tiles.Tile | None = None) -> Tensor:
    """The projection of rows onto a basis.

    Args:
        a: [N, d], any strides.
        v: [d, k], any strides.
        tile: sizes to use instead of the table's; `block_n` is the rank tile.

    Returns:
        a v: [N, k], in the dtype of `a`, summed in float32.
    """
    n, k = a.shape[0], v.shape[1]
    out = torch.empty(n, k, dtype=a.dtype, device=a.device)
    if n == 0:
        return out
    _launch(a, v, out, out, "store", 1, tile or _tile(a, k))
    return out


def sigma_grad(
    g: Tensor,  # [N, out]
    u: Tensor,  # [out, k]
    p: Tensor,  # [N, k]
    core: str = "diag",
    *,
    task: Tensor | None = None,  # [N]
    n_tasks: int | None = None,
    half_width: int = 1,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """The gradient of the core's storage, from dL/dy and the saved projection.

    Args:
        g: dL/dy [N, out], any strides.
        u: left basis [out, k].
        p: x Vh^T [N, k], contiguous, as the forward returned it.
        core: "diag", "band" or "dense".
        task: the task of each row [N], with core="diag" only; `n_tasks` is then the table's length.
        half_width: of a band core.
        tile: sizes to use instead of the table's; `block_n` is the rank tile.

    Returns:
        float32, in the shape of the storage: [k], [n_tasks, k], [2 * half_width + 1, k] or [k, k].

    Raises:
        ValueError: task given for a core other than "diag", or without n_tasks.
    """
    if task is not None and (core != "diag" or n_tasks is None):
        raise ValueError(f"task goes with core='diag' and n_tasks, got core={core!r}, {n_tasks=}")
    n, k = p.shape
    kernel_core = "task" if task is not None else "diag" if core == "diag" else "dense"
    if kernel_core == "dense" and k > tiles.FUSED_RANK[tiles.kind(g.dtype)]:
        return core_storage(project(g, u, tile).float().mT @ p.float(), core, half_width)
    tile = tile or _tile(g, k)
    parts = 1 if kernel_core == "task" else _depth_parts(g, tile)
    grad = gradient_slots(kernel_core, tiles.cdiv(n, tile.block_m) * parts, n, k, g.device)
    if n:
        _launch(g, u, p, grad, kernel_core, parts, tile)
    return finish_gradient(grad, core, task, n_tasks, half_width)


def gradient_slots(core: str, slots: int, n: int, k: int, device: torch.device) -> Tensor:
    """Room for the shares that `reduce_gradient` stores, by the kernel's name of the core."""
    shape = {"diag": (slots, k), "dense": (slots, k, k), "task": (n, k)}[core]
    return torch.empty(shape, dtype=torch.float32, device=device)


def finish_gradient(
    shares: Tensor, core: str, task: Tensor | None, n_tasks: int | None, half_width: int
) -> Tensor:
    """The second, ordered step: shares summed over their slots, or over the rows of each task."""
    if task is not None:
        assert n_tasks is not None
        return sum_by_task(shares, task, n_tasks)
    # of one row tile nothing is left to sum; while tracing, to ask would be a guard on the rows
    total = shares[0] if not tracing() and len(shares) == 1 else shares.sum(0)
    return core_storage(total, core, half_width) if core == "band" else total


def sum_by_task(shares: Tensor, task: Tensor, n_tasks: int) -> Tensor:
    """Rows of `shares` [N, k] summed by task: float32 [n_tasks, k].

    A stable sort puts each task's rows together in their own order, and one program adds them up: the
    same order on every run. Rows whose task is outside [0, n_tasks) belong to nobody.
    """
    k = shares.shape[1]
    grad = torch.empty(n_tasks, k, dtype=torch.float32, device=shares.device)
    if n_tasks == 0:
        return grad
    ordered, order = torch.sort(task.to(torch.int64), stable=True)
    names = torch.arange(n_tasks + 1, device=task.device)
    bounds = torch.searchsorted(ordered, names)
    block_r = min(32, rank_tile(k))  # narrow: tasks times chunks are all the parallelism there is
    grid = (n_tasks, tiles.cdiv(k, block_r))
    launch(
        sum_by_task_kernel,
        grid,
        shares_ptr=shares,
        order_ptr=order,
        bounds_ptr=bounds,
        grad_ptr=grad,
        K=k,
        BLOCK_M=64,
        BLOCK_R=block_r,
        num_warps=4,
    )
    return grad


def _tile(a: Tensor, k: int) -> tiles.Tile:
    return tiles.project_tile(tiles.capability(a.device), tiles.kind(a.dtype), rank_tile(k))


def _depth_parts(a: Tensor, tile: tiles.Tile) -> int:
    """Parts of the depth, so that every multiprocessor has about two programs in flight."""
    row_tiles = max(1, tiles.cdiv(tiles.hint(a.shape[0]), tile.block_m))
    wanted = tiles.cdiv(2 * tiles.multiprocessors(a.device), row_tiles)
    return max(1, min(wanted, tiles.cdiv(a.shape[1], 4 * tile.block_k)))


def _launch(
    a: Tensor, v: Tensor, p: Tensor, out: Tensor, core: str, parts: int, tile: tiles.Tile
) -> None:
    (n, d), k = a.shape, v.shape[1]
    steps = tiles.cdiv(tiles.cdiv(d, tile.block_k), parts)
    grid = (tiles.cdiv(n, tile.block_m), parts, tiles.cdiv(k, tile.block_n))
    launch(
        project_kernel, grid,
        a_ptr=a, v_ptr=v, p_ptr=p, out_ptr=out, N=n, D=d, K=k, steps=steps,
        stride_an=a.stride(0), stride_ad=a.stride(1), stride_vd=v.stride(0), stride_vk=v.stride(1),
        CORE=core, PRECISION=dot_precision(a.dtype),
        BLOCK_M=tile.block_m, BLOCK_R=tile.block_n, BLOCK_D=tile.block_k,
        **tile.options,
    )  # fmt: skip
