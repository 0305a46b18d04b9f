"""Forward and backward of the spectral linear layer: the launchers of the two kernels in `tile_program`.

    forward :  y  = x W^T (+ b) + core(x Vh^T) U^T       store p = x Vh^T
    backward:  dx = g W         + core(g U)    Vh        reduce q * p over rows, q = g U

core(p) = p C^T forward and core(q) = q C backward, C being the core [k, k] that `delta` stands for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastspec.cores import core_matrix
from fastspec.kernels import MAX_RANK, tiles
from fastspec.kernels.launch import launch
from fastspec.kernels.sigma_grad import (
    dot_precision,
    finish_gradient,
    gradient_slots,
    project,
    rank_tile,
    sigma_grad,
)
from fastspec.kernels.tile_program import spectral_linear_bwd_kernel, spectral_linear_fwd_kernel


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
        precomputed, p = x, torch.empty(n, k, dtype=x.dtype, device=x.device)
    else:
        p = project(x, vh.mT)
        precomputed = _apply_core(p, delta, name, task, forward=True)
        name = "precomputed"
    if n == 0:
        return y, p
    block_r, tile, grid, tiles_each = launch_grid(x, n, out, k, tile, w)
    launch(
        spectral_linear_fwd_kernel, grid,
        x_ptr=x, w_ptr=w, bias_ptr=absent(bias, x), u_ptr=u, vh_ptr=vh, delta_ptr=delta,
        task_ptr=absent(task, x), precomputed_ptr=precomputed, y_ptr=y, p_ptr=p,
        N=n, IN=d, OUT=out, K=k, TASKS=len(delta), tiles_each=tiles_each,
        stride_xn=x.stride(0), stride_xi=x.stride(1), **_factor_strides(w, u, vh),
        CORE=name, BIAS=bias is not None, PRECISION=dot_precision(x.dtype),
        TRANSPOSED=transposed(x.dtype, w.stride(1)), WIDE=_spans_2_31(tile, k, x, w, u, vh, y),
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
    block_r, tile, grid, tiles_each = launch_grid(g, n, d, k, tile, w)
    in_kernel = needs_delta and fused
    shares = gradient_slots(name, grid[0], n, k, g.device) if in_kernel else dx
    precomputed = g
    if not fused:
        precomputed = _apply_core(project(g, u), table, name, task, forward=False)
        name = "precomputed"
    if n:
        launch(
            spectral_linear_bwd_kernel, grid,
            g_ptr=g, p_ptr=p, w_ptr=w, u_ptr=u, vh_ptr=vh, delta_ptr=table,
            task_ptr=absent(task, g), precomputed_ptr=precomputed, dx_ptr=dx, shares_ptr=shares,
            N=n, IN=d, OUT=out, K=k, TASKS=len(table), tiles_each=tiles_each,
            stride_gn=g.stride(0), stride_go=g.stride(1), **_factor_strides(w, u, vh),
            CORE=name, GRAD=in_kernel, PRECISION=dot_precision(g.dtype),
            TRANSPOSED=transposed(g.dtype, w.stride(0)), WIDE=_spans_2_31(tile, k, g, w, u, vh, dx),
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


def launch_grid(
    a: Tensor, n: int, out: int, k: int, tile: tiles.Tile | None, weight: Tensor
) -> tuple[int, tiles.Tile, tuple[int, int], int]:
    """The rank tile, the tile, the grid and the output tiles that each program walks."""
    beside, own = rank_tile(k) if fuses(a, k) else 0, tile is None
    if tile is None:
        kind, capability = tiles.kind(a.dtype), tiles.capability(a.device)
        unaligned = not tiles.aligned(a, weight)
        tile = tiles.choose_tile(capability, kind, n, beside, unaligned)
    rows, columns = tiles.hint(n), tiles.hint(out)
    multiprocessors = tiles.multiprocessors(a.device)
    tile, each = tiles.fill(tile, rows, columns, beside, multiprocessors, own)
    # a rank that comes in chunks is a prolonged depth: chunks of the depth's own step
    block_r = beside or tile.block_k
    row_tiles, column_tiles = tiles.cdiv(n, tile.block_m), tiles.cdiv(out, tile.block_n)
    return block_r, tile, (row_tiles, tiles.cdiv(column_tiles, each)), each


def transposed(dtype: torch.dtype, depth_stride: int) -> bool:
    """Whether a product's operands lie as the matrix units can't read them (see `through_registers`)."""
    return tiles.kind(dtype) == "tf32" and depth_stride != 1


def _factor_strides(w: Tensor, u: Tensor, vh: Tensor) -> dict[str, int]:
    """By the kernels' names: rows and columns of w [out, in], u [out, k] and vh [k, in]."""
    names = ("stride_wo", "stride_wi", "stride_uo", "stride_uk", "stride_vk", "stride_vi")
    return dict(zip(names, (*w.stride(), *u.stride(), *vh.stride()), strict=True))


def _spans_2_31(tile: tiles.Tile, k: int, *operands: Tensor) -> bool:
    """Whether the elements of one tile of any operand lie further apart than 32 bits can say."""
    side = max(tile.block_m, tile.block_n, tile.block_k, rank_tile(k))
    return any(side * sum(t.stride()) >= 2**31 for t in operands)


def absent(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Absent operands pass some valid pointer, which the kernel's constants keep it from reading."""
    return stand_in if tensor is None else tensor.contiguous()
