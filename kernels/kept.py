"""Copies of W + U C Vh, made again on the device only where the coefficients have changed.

A launch compares the coefficients with those that a copy was made for, and ends where they are equal. So
nothing waits for a look at them, and a CUDA graph holds the comparison too. In 16 bits the sum is rounded
up or down by each entry's own fixed threshold (`fastspec.ops.kept`).

One layer is one launch (`keep`); all layers of one kind are one too, by tables of addresses (`Tables`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastspec.kernels import arrival, tiles
from fastspec.kernels.launch import launch
from fastspec.kernels.merge import ELEMENT, TILES
from fastspec.kernels.shift import at_address, shifted_tile
from fastspec.kernels.sigma_grad import rank_tile

AT_ONCE = 1024  # coefficients compared at once

# ----------------------------------------------------------------------------------------- kernels


# fmt: off
@triton.jit
def round_by_threshold(value, index, DTYPE: tl.constexpr):
    """float32 to 16 bits: up where what lies beyond the last bit exceeds the threshold, else down.

    float32 stays as it is. The threshold of an index is a hash of it: `lowbias32` (https://nullprogram.com/blog/2018/07/31/).
    """
    if DTYPE == tl.float32:  # noqa: SIM300
        return value
    h = index.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    beyond: tl.constexpr = 0x1FFF if DTYPE == tl.float16 else 0xFFFF  # noqa: SIM300  bits it has not
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + (h & beyond)) & (0xFFFFFFFF ^ beyond)).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), rounded, value).to(DTYPE)


@triton.jit
def differing(delta_ptr, made_for_ptr, cells, CELLS: tl.constexpr):
    """How many of the coefficients are not those that the copy was made for."""
    cell = tl.arange(0, CELLS)
    count = tl.zeros([CELLS], dtype=tl.int32)
    for c in range(0, cells, CELLS):
        ok = cell < cells - c
        now = tl.load(delta_ptr + c + cell, mask=ok, other=0.0)
        count += (now != tl.load(made_for_ptr + c + cell, mask=ok, other=0.0)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def note(delta_ptr, made_for_ptr, cells, CELLS: tl.constexpr):
    """made_for = delta."""
    cell = tl.arange(0, CELLS)
    for c in range(0, cells, CELLS):
        ok = cell < cells - c
        tl.store(made_for_ptr + c + cell, tl.load(delta_ptr + c + cell, mask=ok, other=0.0), mask=ok)


@triton.jit
def keep_tile(
    w_ptr, u_ptr, vh_ptr, delta_ptr, made_for_ptr, out_ptr, bias_ptr, bias_out_ptr,
    row_tile, column_tile, forced,
    OUT, IN, K, cells,
    stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi, stride_oo, stride_oi,
    CORE: tl.constexpr, BIAS: tl.constexpr, CELLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """One tile of out = W + U C Vh, unless it was made for this C already; whether it was made now."""
    rows = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if BIAS:  # so few numbers that to compare them would cost as much
        ok = rows < tl.where(column_tile == 0, OUT, 0)
        tl.store(bias_out_ptr + rows, tl.load(bias_ptr + rows, mask=ok, other=0.0), mask=ok)
    changed = differing(delta_ptr, made_for_ptr, cells, CELLS) + forced > 0
    if changed:
        cols = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_ok = (rows < OUT)[:, None]
        col_ok = (cols < IN)[None, :]
        value = shifted_tile(
            w_ptr, u_ptr, vh_ptr, delta_ptr, rows, cols, row_ok, col_ok, K,
            stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi,
            CORE, "ieee", False, BLOCK_M, BLOCK_N, BLOCK_R,
        )
        index = rows[:, None] * IN + cols[None, :]
        out_ptrs = out_ptr + rows[:, None] * stride_oo + cols[None, :] * stride_oi
        dtype: tl.constexpr = w_ptr.dtype.element_ty
        tl.store(out_ptrs, round_by_threshold(value, index, dtype), mask=row_ok & col_ok)
    return changed


@triton.jit
def keep_kernel(
    w_ptr,            # [OUT, IN]
    u_ptr,            # [OUT, K]
    vh_ptr,           # [K, IN]
    delta_ptr,        # float32 contiguous: [K] or [K, K]
    made_for_ptr,     # the same, of the copy as it is
    out_ptr,          # [OUT, IN], the copy
    bias_ptr,         # [OUT]; BIAS only
    bias_out_ptr,     # [OUT], a copy of it; BIAS only
    arrived_ptr,      # int32, zero before and after
    forced,           # int: not 0 to make it in any case
    OUT, IN, K, cells,
    stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi, stride_oo, stride_oi,
    CORE: tl.constexpr, BIAS: tl.constexpr, CELLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """out = W + U C Vh, unless it was made for this C already; then made_for = C."""
    # alike in every program: the last one alone changes made_for
    changed = keep_tile(
        w_ptr, u_ptr, vh_ptr, delta_ptr, made_for_ptr, out_ptr, bias_ptr, bias_out_ptr,
        tl.program_id(0), tl.program_id(1), forced, OUT, IN, K, cells,
        stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi, stride_oo, stride_oi,
        CORE, BIAS, CELLS, BLOCK_M, BLOCK_N, BLOCK_R,
    )
    if changed:
        tl.debug_barrier()  # everybody here has compared before one of us says so
        programs = tl.num_programs(0) * tl.num_programs(1)
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1:
            note(delta_ptr, made_for_ptr, cells, CELLS)
            tl.store(arrived_ptr, 0)


@triton.jit
def keep_all_kernel(
    w_table,          # [L] int64, addresses of what `keep_kernel` is given, layer by layer
    u_table,
    vh_table,
    delta_table,
    made_for_table,   # read alone: `note_all_kernel` follows when all programs have compared
    out_table,
    bias_table,       # BIAS only
    bias_out_table,   # BIAS only
    OUT, IN, K, cells,
    stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi, stride_oo, stride_oi,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    CORE: tl.constexpr, BIAS: tl.constexpr, CELLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """Every layer's copy, where its coefficients have changed."""
    layer = tl.program_id(2)
    keep_tile(
        at_address(w_table, layer, DTYPE, ALIGNED), at_address(u_table, layer, DTYPE, ALIGNED),
        at_address(vh_table, layer, DTYPE, ALIGNED), at_address(delta_table, layer, tl.float32, False),
        at_address(made_for_table, layer, tl.float32, False), at_address(out_table, layer, DTYPE, ALIGNED),
        at_address(bias_table, layer, DTYPE, False), at_address(bias_out_table, layer, DTYPE, False),
        tl.program_id(1), tl.program_id(0), 0, OUT, IN, K, cells,
        stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi, stride_oo, stride_oi,
        CORE, BIAS, CELLS, BLOCK_M, BLOCK_N, BLOCK_R,
    )


@triton.jit
def note_all_kernel(
    delta_table,      # [L] int64, addresses
    made_for_table,
    cells_table,      # [L] int64, how many there are
    CELLS: tl.constexpr,
):
    """made_for = C, for every layer of every kind."""
    layer = tl.program_id(0)
    delta_ptr = at_address(delta_table, layer, tl.float32, False)
    note(delta_ptr, at_address(made_for_table, layer, tl.float32, False), tl.load(cells_table + layer), CELLS)
# fmt: on


# --------------------------------------------------------------------------------------- launchers

Operands = tuple[
    Tensor,  # out [out, in], the copy
    Tensor,  # made_for, as delta
    Tensor,  # weight [out, in]
    Tensor,  # u [out, k]
    Tensor,  # vh [k, in]
    Tensor,  # delta [k] or [k, k] float32, contiguous
    str,  # core
    Tensor | None,  # bias [out]
    Tensor | None,  # bias_out [out], a copy of it
]
TABLES = ("w", "u", "vh", "delta", "made_for", "out", "bias", "bias_out")


def keep(
    out: Tensor,  # [out, in], the copy
    made_for: Tensor,  # as delta
    weight: Tensor,  # [out, in]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    delta: Tensor,  # [k] or [k, k] float32
    core: str,
    forced: bool,
    bias: Tensor | None = None,  # [out]
    bias_out: Tensor | None = None,  # [out]
) -> None:
    """Let `out` hold W + U C Vh, `made_for` the delta it was made for, and `bias_out` the bias."""
    arrived = arrival.counter(weight.device)
    assert arrived is not None, "nothing traces through this operator"
    delta = delta.contiguous()
    operands = (out, made_for, weight, u, vh, delta, core, bias, bias_out)
    launch(
        keep_kernel, _grid(weight),
        w_ptr=weight, u_ptr=u, vh_ptr=vh, delta_ptr=delta, made_for_ptr=made_for, out_ptr=out,
        bias_ptr=weight if bias is None else bias, bias_out_ptr=out if bias_out is None else bias_out,
        arrived_ptr=arrived, forced=int(forced), **_sizes(operands), **_tile(weight).options,
    )  # fmt: skip


class Tables:
    """Where the operands of many layers lie: one launch for all layers of each kind, and one to note it.

    A kind is all that `keep` depends on but addresses. The tables hold no tensor: whoever keeps them gives
    them up when one is replaced. They are copied to the device here, which a capture of a CUDA graph does
    not take, and a captured launch reads them where they lie.
    """

    def __init__(self, layers: Sequence[Operands]) -> None:
        self.device = layers[0][0].device
        kinds = defaultdict(list)
        for operands in layers:
            tensors = (
                t if t is None else (t.shape, t.stride()) for t in operands if t is not operands[6]
            )
            kinds[operands[0].dtype, operands[6], tuple(tensors)].append(operands)
        self.kinds = [_Kind(alike, self.device) for alike in kinds.values()]
        deltas = [[o[5].data_ptr(), o[1].data_ptr(), o[5].numel()] for o in layers]
        self.noted = torch.tensor(deltas).mT.contiguous().to(self.device)
        self.cells = _at_once(max(o[5].numel() for o in layers))

    def launch(self) -> None:
        """Make all copies whose coefficients have changed."""
        with torch.cuda.device_of(self.noted):
            for kind in self.kinds:
                launch(keep_all_kernel, kind.grid, **kind.operands)
            names = ("delta_table", "made_for_table", "cells_table")
            tables = dict(zip(names, self.noted, strict=True))
            launch(note_all_kernel, (self.noted.shape[1],), **tables, CELLS=self.cells, num_warps=1)


class _Kind:
    """The launch for layers of one kind."""

    def __init__(self, layers: Sequence[Operands], device: torch.device) -> None:
        first = layers[0]
        weight = first[2]
        rows = [
            (
                weight,
                u,
                vh,
                delta,
                made_for,
                out,
                out if bias is None else bias,
                out if of is None else of,
            )
            for out, made_for, weight, u, vh, delta, _, bias, of in layers
        ]
        addresses = torch.tensor([[t.data_ptr() for t in row] for row in rows]).mT.contiguous()
        down, across = _grid(weight)
        self.grid = (across, down, len(layers))
        self.operands = {
            **{f"{n}_table": t for n, t in zip(TABLES, addresses.to(device), strict=True)},
            **_sizes(first), "DTYPE": ELEMENT[weight.dtype],
            "ALIGNED": not (addresses[[0, 1, 2, 5]] % 16).any().item(), **_tile(weight).options,
        }  # fmt: skip


def _tile(weight: Tensor) -> tiles.Tile:
    """As `merge` has it; a sum of float32 is never made in TF32 here, for a copy serves many calls."""
    return TILES["16bit" if weight.dtype.itemsize == 2 else "fp32"]


def _grid(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    tile = _tile(weight)
    return tiles.cdiv(rows, tile.block_m), tiles.cdiv(columns, tile.block_n)


def _at_once(cells: int) -> int:
    return min(AT_ONCE, 1 << (max(1, cells) - 1).bit_length())


def _sizes(operands: Operands) -> dict[str, object]:
    """Sizes, strides and blocks of a layer."""
    out, _, weight, u, vh, delta, core, bias, _ = operands
    k, tile = u.shape[1], _tile(weight)
    return {
        "OUT": weight.shape[0], "IN": weight.shape[1], "K": k, "cells": delta.numel(),
        "stride_wo": weight.stride(0), "stride_wi": weight.stride(1), "stride_uo": u.stride(0),
        "stride_uk": u.stride(1), "stride_vk": vh.stride(0), "stride_vi": vh.stride(1),
        "stride_oo": out.stride(0), "stride_oi": out.stride(1),
        "CORE": core, "BIAS": bias is not None, "CELLS": _at_once(delta.numel()),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_R": min(rank_tile(k), tile.block_k),
    }  # fmt: skip
