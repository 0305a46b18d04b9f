"""Sums over the programs of one launch, made by whichever of them is the last to arrive.

A program leaves its share in memory and counts itself in. Who finds everybody else counted adds up all
shares, in their order: the same bits whoever it is. A second launch for so little would cost more than
the sum. Counters are zero before a launch and set back by its last program.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastspec.kernels import tiles
from fastspec.kernels.launch import tracing

AT_ONCE = 8192  # numbers that one program adds in a step: 32 registers a thread of 8 warps
STEPS = 8  # more take longer than a launch of their own


# fmt: off
@triton.jit
def sum_shares(
    shares_ptr,       # [slots, cells] float32, contiguous
    sum_ptr,          # [cells] float32
    arrived_ptr,      # int32
    slots,            # programs that leave a share
    cells,
    CELLS: tl.constexpr, SLOTS: tl.constexpr,  # powers of two: at least cells; slots added in one step
):
    """Counts this program in; the last one writes the sum of all shares."""
    tl.debug_barrier()  # this program's share is in memory before one of its threads says so
    before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    if before == slots - 1:
        cell = tl.arange(0, CELLS)
        slot = tl.arange(0, SLOTS)
        total = tl.zeros([CELLS], dtype=tl.float32)
        for first in range(0, slots, SLOTS):
            offs = (first + slot)[:, None] * cells + cell[None, :]
            ok = (slot < slots - first)[:, None] & (cell < cells)[None, :]
            # past the L1 cache, which is this multiprocessor's own
            total += tl.sum(tl.load(shares_ptr + offs, mask=ok, other=0.0, cache_modifier=".cg"), axis=0)
        tl.store(sum_ptr + cell, total, mask=cell < cells)
        tl.store(arrived_ptr, 0)
# fmt: on


def fits(slots: int, cells: int) -> bool:
    """Whether the last program adds up so many shares faster than another launch would."""
    return tiles.cdiv(slots, blocks(cells)["SLOTS"]) <= STEPS


def blocks(cells: int) -> dict[str, int]:
    """`sum_shares`' constants for so many numbers a share."""
    size = 1 << max(0, cells - 1).bit_length()
    return {"CELLS": size, "SLOTS": max(1, AT_ONCE // size)}


class _Counters:
    """Counters of one device, handed out so that no two launches at work share one."""

    EAGER, CAPTURED = (
        4096,
        28672,
    )  # launches in flight are far fewer; those of graphs live with the graph

    def __init__(self, device: torch.device) -> None:
        # 16 bytes each: for another alignment Triton would compile a kernel again
        size = (self.EAGER + self.CAPTURED, 4)
        self.memory = torch.zeros(size, dtype=torch.int32, device=device)
        self.eager = itertools.cycle(range(self.EAGER))
        self.captured: Iterator[int] = iter(range(self.EAGER, len(self.memory)))


_counters: dict[torch.device, _Counters] = {}


def counter(device: torch.device) -> Tensor | None:
    """A counter [1] that is zero when its launch begins; None while something traces."""
    if tracing():
        return None
    own = _counters.get(device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        place = None if own is None else next(own.captured, None)
        if place is None:  # memory of the graph's own, and one more node, which sets it to zero
            return torch.zeros(1, dtype=torch.int32, device=device)
    else:
        own = own or _counters.setdefault(device, _Counters(device))
        place = next(own.eager)
    assert own is not None
    return own.memory[place, :1]
