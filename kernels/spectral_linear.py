"""Forward and backward of the spectral linear layer: one tile program, two kernels, two launchers.

    forward :  y  = x W^T (+ b) + core(x Vh^T) U^T       store p = x Vh^T
    backward:  dx = g W         + core(g U)    Vh        reduce q * p over rows, q = g U

Both are  out = A B + core(A V) C  with (A, B, V, C) = (x, W^T, Vh^T, U^T) or (g, W, U, Vh). A program
owns BLOCK_M rows. The walk over the depth of its first output tile also accumulates the projection
A V, which then stays in registers and enters every output tile as one more step of its float32
accumulator (design section 3). Ranks above what registers hold are projected beforehand and arrive
with the core applied (CORE="given"), BLOCK_R columns at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastspec.kernels import tiles
from fastspec.kernels.launch import launch
from fastspec.kernels.sigma_grad import (
    MAX_RANK,
    dot_precision,
    finish_gradient,
    gradient_slots,
    project,
    rank_tile,
    reduce_gradient,
    sigma_grad,
)
from fastspec.reference import core_matrix

# ------------------------------------------------------------------------------------ tile program


# fmt: off
@triton.jit
def offsets(M: tl.constexpr, stride_m, N: tl.constexpr, stride_n, WIDE: tl.constexpr):
    """Element offsets [M, N] inside a tile; bases are 64-bit, these only where a tile spans 2^31."""
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    if WIDE:
        m = m.to(tl.int64)
        n = n.to(tl.int64)
    return m[:, None] * stride_m + n[None, :] * stride_n


@triton.jit
def scale(
    proj,             # [BLOCK_M, BLOCK_R] float32
    delta_ptr, task_ptr, row0, row_ok, rank_ok, K, TASKS,
    CORE: tl.constexpr, FORWARD: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):
    """The core applied to a projection tile, in the dtype of the matrix units."""
    ranks = tl.arange(0, proj.shape[1])
    if CORE == "diag":
        delta = tl.load(delta_ptr + ranks, mask=rank_ok, other=0.0)
        scaled = proj * delta[None, :]
    elif CORE == "task":
        rows = tl.arange(0, proj.shape[0])
        task = tl.load(task_ptr + row0 + rows, mask=row_ok, other=0).to(tl.int64)
        adapted = (task >= 0)[:, None] & rank_ok[None, :]
        # a task beyond the table makes its row NaN instead of reading foreign memory
        known = adapted & (task < TASKS)[:, None]
        delta = tl.load(delta_ptr + task[:, None] * K + ranks[None, :], mask=known, other=float("nan"))
        scaled = tl.where(adapted, proj * delta, 0.0)
    else:  # dense: p C^T forward, q C backward
        i = ranks[None, :] if FORWARD else ranks[:, None]
        j = ranks[:, None] if FORWARD else ranks[None, :]
        core = tl.load(delta_ptr + i * K + j, mask=rank_ok[:, None] & rank_ok[None, :], other=0.0)
        scaled = tl.dot(proj.to(DTYPE), core.to(DTYPE), input_precision=PRECISION)
    return scaled.to(DTYPE)


@triton.jit
def turned(t, TURN: tl.constexpr):
    """The operand t itself, by way of registers with TURN.

    wgmma and tcgen05 read 4-byte operands with the depth contiguous only. A tile whose rows run the other
    way would be transposed by its copies into shared memory, 4 bytes each. What arithmetic has touched comes
    from registers: the copies are of 16 bytes then, and the tile is transposed on its way back.
    """
    return t + 0.0 if TURN else t


@triton.jit
def walk(
    a_base, b_base, v_base, a_offs, b_offs, v_offs, row_ok, col_ok, rank_ok, D, a_step, b_step, v_step,
    PROJECT: tl.constexpr, PRECISION: tl.constexpr, TURN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A B for one output tile and, with PROJECT, A V from the same loads of A; both float32."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    proj = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    depth = tl.arange(0, BLOCK_K)
    for d in range(0, D, BLOCK_K):
        d_ok = depth < D - d
        a = tl.load(a_base + a_offs, mask=row_ok[:, None] & d_ok[None, :], other=0.0)
        b = tl.load(b_base + b_offs, mask=d_ok[:, None] & col_ok[None, :], other=0.0)
        acc = tl.dot(a, turned(b, TURN), acc, input_precision=PRECISION)
        if PROJECT:
            v = tl.load(v_base + v_offs, mask=d_ok[:, None] & rank_ok[None, :], other=0.0)
            proj = tl.dot(a, turned(v, TURN), proj, input_precision=PRECISION)
            v_base += v_step
        a_base += a_step
        b_base += b_step
    return acc, proj


@triton.jit
def add_correction(
    acc, scaled, given_base, c_base, stride_cr, stride_cn, row_ok, col_ok, K,
    CORE: tl.constexpr, PRECISION: tl.constexpr, TURN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """acc + core(A V) C for one output tile; the thin product's operands are in the input's dtype."""
    ranks = tl.arange(0, BLOCK_R)
    c_offs = offsets(BLOCK_R, stride_cr, BLOCK_N, stride_cn, WIDE)
    if CORE == "given":
        s_offs = offsets(BLOCK_M, K, BLOCK_R, 1, WIDE)
        for r in range(0, K, BLOCK_R):
            r_ok = ranks < K - r
            s = tl.load(given_base + s_offs, mask=row_ok[:, None] & r_ok[None, :], other=0.0)
            c = tl.load(c_base + c_offs, mask=r_ok[:, None] & col_ok[None, :], other=0.0)
            acc = tl.dot(s, turned(c, TURN), acc, input_precision=PRECISION)
            given_base += BLOCK_R
            c_base += tl.full([], BLOCK_R, tl.int64) * stride_cr
    else:
        c = tl.load(c_base + c_offs, mask=(ranks < K)[:, None] & col_ok[None, :], other=0.0)
        acc = tl.dot(scaled, turned(c, TURN), acc, input_precision=PRECISION)
    return acc


@triton.jit
def spectral_linear_fwd_kernel(
    x_ptr,            # [N, IN]
    w_ptr,            # [OUT, IN]
    bias_ptr,         # [OUT] contiguous; BIAS only
    u_ptr,            # [OUT, K]
    vh_ptr,           # [K, IN]
    delta_ptr,        # float32 contiguous: [K], [TASKS, K] or [K, K]
    task_ptr,         # [N] contiguous; CORE="task" only
    given_ptr,        # [N, K] contiguous; CORE="given" only
    y_ptr,            # [N, OUT] contiguous
    p_ptr,            # [N, K] contiguous; not with CORE="given"
    N, IN, OUT, K, TASKS, tiles_each,
    stride_xn, stride_xi, stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi,
    CORE: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, TURN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    split = tl.program_id(1)
    row0 = tl.program_id(0).to(tl.int64) * BLOCK_M
    row_ok = tl.arange(0, BLOCK_M) < N - row0
    rank_ok = tl.arange(0, BLOCK_R) < K
    step = tl.full([], BLOCK_K, tl.int64)
    x_base = x_ptr + row0 * stride_xn
    x_offs = offsets(BLOCK_M, stride_xn, BLOCK_K, stride_xi, WIDE)
    w_offs = offsets(BLOCK_K, stride_wi, BLOCK_N, stride_wo, WIDE)
    vh_offs = offsets(BLOCK_K, stride_vi, BLOCK_R, stride_vk, WIDE)
    scaled = tl.zeros([BLOCK_M, BLOCK_R], dtype=dtype)
    first = split * tiles_each
    last = min(first + tiles_each, tl.cdiv(OUT, BLOCK_N))
    for tile in range(first, last):
        col0 = tl.full([], BLOCK_N, tl.int64) * tile
        col_ok = tl.arange(0, BLOCK_N) < OUT - col0
        w_base = w_ptr + col0 * stride_wo
        if CORE != "given" and tile == first:
            acc, p = walk(
                x_base, w_base, vh_ptr, x_offs, w_offs, vh_offs, row_ok, col_ok, rank_ok, IN,
                step * stride_xi, step * stride_wi, step * stride_vi,
                True, PRECISION, TURN, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_K,
            )
            if split == 0:
                p_offs = offsets(BLOCK_M, K, BLOCK_R, 1, False)
                p_ok = row_ok[:, None] & rank_ok[None, :]
                tl.store(p_ptr + row0 * K + p_offs, p.to(dtype), mask=p_ok)
            scaled = scale(
                p, delta_ptr, task_ptr, row0, row_ok, rank_ok, K, TASKS, CORE, True, PRECISION, dtype
            )
        else:
            acc, _ = walk(
                x_base, w_base, vh_ptr, x_offs, w_offs, vh_offs, row_ok, col_ok, rank_ok, IN,
                step * stride_xi, step * stride_wi, step * stride_vi,
                False, PRECISION, TURN, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_K,
            )
        acc = add_correction(
            acc, scaled, given_ptr + row0 * K, u_ptr + col0 * stride_uo, stride_uk, stride_uo,
            row_ok, col_ok, K, CORE, PRECISION, TURN, WIDE, BLOCK_M, BLOCK_N, BLOCK_R,
        )
        if BIAS:
            bias = tl.load(bias_ptr + col0 + tl.arange(0, BLOCK_N), mask=col_ok, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        y_ptrs = y_ptr + row0 * OUT + col0 + offsets(BLOCK_M, OUT, BLOCK_N, 1, WIDE)
        tl.store(y_ptrs, acc.to(dtype), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def spectral_linear_bwd_kernel(
    g_ptr,            # [N, OUT], dL/dy
    p_ptr,            # [N, K] contiguous; GRAD only
    w_ptr,            # [OUT, IN]
    u_ptr,            # [OUT, K]
    vh_ptr,           # [K, IN]
    delta_ptr,        # float32 contiguous: [K], [TASKS, K] or [K, K]
    task_ptr,         # [N] contiguous; CORE="task" only
    given_ptr,        # [N, K] contiguous; CORE="given" only
    dx_ptr,           # [N, IN] contiguous
    grad_ptr,         # float32, as in `reduce_gradient`, a slot a row tile; GRAD only
    N, IN, OUT, K, TASKS, tiles_each,
    stride_gn, stride_go, stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi,
    CORE: tl.constexpr, GRAD: tl.constexpr,
    PRECISION: tl.constexpr, TURN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    slot = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row0 = slot * BLOCK_M
    row_ok = tl.arange(0, BLOCK_M) < N - row0
    rank_ok = tl.arange(0, BLOCK_R) < K
    step = tl.full([], BLOCK_K, tl.int64)
    g_base = g_ptr + row0 * stride_gn
    g_offs = offsets(BLOCK_M, stride_gn, BLOCK_K, stride_go, WIDE)
    w_offs = offsets(BLOCK_K, stride_wo, BLOCK_N, stride_wi, WIDE)
    u_offs = offsets(BLOCK_K, stride_uo, BLOCK_R, stride_uk, WIDE)
    scaled = tl.zeros([BLOCK_M, BLOCK_R], dtype=dtype)
    first = split * tiles_each
    last = min(first + tiles_each, tl.cdiv(IN, BLOCK_N))
    for tile in range(first, last):
        col0 = tl.full([], BLOCK_N, tl.int64) * tile
        col_ok = tl.arange(0, BLOCK_N) < IN - col0
        w_base = w_ptr + col0 * stride_wi
        if CORE != "given" and tile == first:
            acc, q = walk(
                g_base, w_base, u_ptr, g_offs, w_offs, u_offs, row_ok, col_ok, rank_ok, OUT,
                step * stride_go, step * stride_wo, step * stride_uo,
                True, PRECISION, TURN, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_K,
            )
            if GRAD and split == 0:
                reduce_gradient(q, p_ptr, grad_ptr, slot, row0, row_ok, 0, rank_ok, K, CORE, PRECISION)
            scaled = scale(
                q, delta_ptr, task_ptr, row0, row_ok, rank_ok, K, TASKS, CORE, False, PRECISION, dtype
            )
        else:
            acc, _ = walk(
                g_base, w_base, u_ptr, g_offs, w_offs, u_offs, row_ok, col_ok, rank_ok, OUT,
                step * stride_go, step * stride_wo, step * stride_uo,
                False, PRECISION, TURN, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_K,
            )
        acc = add_correction(
            acc, scaled, given_ptr + row0 * K, vh_ptr + col0 * stride_vi, stride_vk, stride_vi,
            row_ok, col_ok, K, CORE, PRECISION, TURN, WIDE, BLOCK_M, BLOCK_N, BLOCK_R,
        )
        dx_ptrs = dx_ptr + row0 * IN + col0 + offsets(BLOCK_M, IN, BLOCK_N, 1, WIDE)
        tl.store(dx_ptrs, acc.to(dtype), mask=row_ok[:, None] & col_ok[None, :])
# fmt: on


# --------------------------------------------------------------------------------------- launchers


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
    """y = x (W + U C Vh)^T + b and the projection p = x Vh^T that the backward needs.

    Args:
        x, w, bias, u, vh: one dtype (float32, bfloat16, float16) and device, any strides.
        delta: float32 storage of the core: [k], [k, k], [2h + 1, k], or a table [tasks, k] with task.
        core: "diag", "dense" or "band" (run as a dense core: k^2 is small beside in * out).
        task: the task of each row, integers [N]; core="diag" only. Rows with a negative one are not
            adapted, rows whose task is beyond the table come out NaN.
        tile: sizes to use instead of the table's.

    Returns:
        y in x's dtype, and p in x's dtype: its rounding is that which x and g already carry, and
        float32 would double the one activation that is saved.

    Raises:
        ValueError: k above `MAX_RANK`, a dtype without a kernel, or task with another core.
    """
    name, delta = kernel_core(x, u, delta, core, task)
    (n, d), (out, k) = x.shape, u.shape
    y = torch.empty(n, out, dtype=x.dtype, device=x.device)
    if fuses(x, k):
        given, p = x, torch.empty(n, k, dtype=x.dtype, device=x.device)
    else:
        p = project(x, vh.mT)
        given, name = _apply_core(p, delta, name, task, forward=True), "given"
    if n == 0:
        return y, p
    block_r, tile, grid, tiles_each = plan(x, n, out, k, tile)
    launch(
        spectral_linear_fwd_kernel, grid,
        x, w, absent(bias, x), u, vh, delta, absent(task, x), given, y, p,
        n, d, out, k, len(delta), tiles_each,
        *x.stride(), *w.stride(), *u.stride(), *vh.stride(),
        CORE=name, BIAS=bias is not None, PRECISION=dot_precision(x.dtype),
        TURN=turns(x.dtype, w.stride(1)), WIDE=_spans_2_31(tile, k, x, w, u, vh, y),
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
    needs_dx: bool = True,
    needs_delta: bool = True,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # [N, in], the shape of delta
    """dx = g W_eff and the gradient of delta (float32), from one walk over g.

    Arguments as in `spectral_linear_fwd`; `p` is what it returned. What is not needed is not computed
    and comes back as None; without dx only `sigma_grad` runs. Raises the same errors.
    """
    half_width = delta.shape[0] // 2
    name, table = kernel_core(g, u, delta, core, task)
    (n, out), (k, d) = g.shape, vh.shape
    grad = None
    n_tasks = len(delta) if task is not None else None
    fused = fuses(g, k)
    if needs_delta and not (fused and needs_dx):
        grad = sigma_grad(g, u, p, core, task=task, n_tasks=n_tasks, half_width=half_width)
    if not needs_dx:
        return None, grad
    dx = torch.empty(n, d, dtype=g.dtype, device=g.device)
    block_r, tile, grid, tiles_each = plan(g, n, d, k, tile)
    in_kernel = needs_delta and fused
    shares = gradient_slots(name, grid[0], n, k, g.device) if in_kernel else dx
    given = g
    if not fused:
        given = _apply_core(project(g, u), table, name, task, forward=False)
        name = "given"
    if n:
        launch(
            spectral_linear_bwd_kernel, grid,
            g, p, w, u, vh, table, absent(task, g), given, dx, shares,
            n, d, out, k, len(table), tiles_each,
            *g.stride(), *w.stride(), *u.stride(), *vh.stride(),
            CORE=name, GRAD=in_kernel, PRECISION=dot_precision(g.dtype),
            TURN=turns(g.dtype, w.stride(0)), WIDE=_spans_2_31(tile, k, g, w, u, vh, dx),
            **tile.blocks(block_r), **tile.options,
        )  # fmt: skip
    if in_kernel:
        grad = finish_gradient(shares, core, task, n_tasks, half_width)
    return dx, grad


def kernel_core(
    a: Tensor, u: Tensor, delta: Tensor, core: str, task: Tensor | None
) -> tuple[str, Tensor]:
    """The kernel's name of the core, and its storage as the kernel reads it."""
    if u.shape[1] > MAX_RANK:
        raise ValueError(f"u must have at most {MAX_RANK} columns (k), got {u.shape[1]}; use ATen")
    if a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the kernels take float32, bfloat16 or float16, got {a.dtype}; use ATen")
    if task is not None:
        if core != "diag":
            raise ValueError(f"task goes with core='diag', got core={core!r}")
        return "task", delta.contiguous()
    if core == "band":
        return "dense", core_matrix(delta, "band")
    return core, delta.contiguous()


def fuses(a: Tensor, k: int) -> bool:
    """Whether the projection onto k directions is computed beside the output tile."""
    return k <= tiles.FUSED_RANK[tiles.kind(a.dtype)]


def _apply_core(
    proj: Tensor, delta: Tensor, name: str, task: Tensor | None, forward: bool
) -> Tensor:
    """core(A V) [N, k] for ranks that registers do not hold: thin beside the layer's own product."""
    if name == "dense":
        c = delta.to(proj.dtype)
        return proj @ (c.mT if forward else c)
    if task is not None:
        beyond, absent_task = (task >= len(delta))[:, None], (task < 0)[:, None]
        delta = delta[task.clamp(0, len(delta) - 1)].masked_fill(beyond, float("nan"))
        return (proj * delta).masked_fill(absent_task, 0.0).to(proj.dtype)
    return (proj * delta).to(proj.dtype)


def plan(
    a: Tensor, n: int, out: int, k: int, tile: tiles.Tile | None, descriptors: bool = False
) -> tuple[int, tiles.Tile, tuple[int, int], int]:
    """The rank tile, the tile, the grid and the output tiles that each program walks."""
    beside, own = rank_tile(k) if fuses(a, k) else 0, tile is None
    if tile is None:
        kind, capability = tiles.kind(a.dtype), tiles.capability(a.device)
        tile = tiles.choose_tile(capability, kind, n, beside, descriptors)
    rows, columns = tiles.hint(n), tiles.hint(out)
    multiprocessors = tiles.multiprocessors(a.device)
    tile, each = tiles.fill(tile, rows, columns, beside, multiprocessors, own)
    # a rank that comes in chunks is a prolonged depth: chunks of the depth's own step
    block_r = beside or tile.block_k
    row_tiles, column_tiles = tiles.cdiv(n, tile.block_m), tiles.cdiv(out, tile.block_n)
    return block_r, tile, (row_tiles, tiles.cdiv(column_tiles, each)), each


def turns(dtype: torch.dtype, depth_stride: int) -> bool:
    """Whether the operands of a product go by way of registers (see `turned`)."""
    return tiles.kind(dtype) == "tf32" and depth_stride != 1


def _spans_2_31(tile: tiles.Tile, k: int, *operands: Tensor) -> bool:
    """Whether the elements of one tile of any operand lie further apart than 32 bits can say."""
    side = max(tile.block_m, tile.block_n, tile.block_k, rank_tile(k))
    return any(side * sum(t.stride()) >= 2**31 for t in operands)


def absent(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Absent operands pass some valid pointer, which the kernel's constants keep it from reading."""
    return stand_in if tensor is None else tensor.contiguous()
