"""The k x k core C between the frozen bases: its kinds, and how the trained storage `delta` stands for it.

    core     delta         C
    diag     [k]           diag(delta)
    band     [2h + 1, k]   C[i, i + o] = delta[h + o, i] for |o| <= h; places outside C are ignored
    dense    [k, k]        delta

Source: arXiv 2605.07302 (diag), SVFT arXiv 2405.19597 (band), LoRA-XS arXiv 2405.17604 (dense).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Core = Literal["diag", "band", "dense"]
CORES = ("diag", "band", "dense")


def delta_shape(core: str, k: int, half_width: int = 1) -> tuple[int, ...]:
    """The shape of the trained storage of a core of order k."""
    return {"diag": (k,), "band": (2 * half_width + 1, k), "dense": (k, k)}[core]


def core_matrix(delta: Tensor, core: str) -> Tensor:
    """The k x k core C that the storage `delta` stands for."""
    if core == "diag":
        return torch.diag(delta)
    if core == "dense":
        return delta
    width, k = delta.shape  # band
    h = width // 2
    c = delta.new_zeros(k, k)
    for o in range(max(-h, 1 - k), min(h, k - 1) + 1):
        values = delta[h + o, max(0, -o) : k - max(0, o)]
        c = c + torch.diag_embed(values, offset=o)
    return c


def core_storage(c: Tensor, core: str, half_width: int = 1) -> Tensor:
    """The entries of a k x k matrix that the core trains, in its storage; inverse of `core_matrix`."""
    if core == "diag":
        return c.diagonal().clone()
    if core == "dense":
        return c
    k = c.shape[0]
    out = c.new_zeros(2 * half_width + 1, k)
    for o in range(max(-half_width, 1 - k), min(half_width, k - 1) + 1):
        out[half_width + o, max(0, -o) : k - max(0, o)] = c.diagonal(o)
    return out


def diagonals(width: int, k: int) -> list[tuple[int, slice, slice]]:
    """Of a band [width, k] of order k: every diagonal's row in the storage, its rows and columns of C."""
    h = width // 2
    found = []
    for o in range(max(-h, 1 - k), min(h, k - 1) + 1):
        i = slice(max(0, -o), k - max(0, o))
        found.append((h + o, i, slice(i.start + o, i.stop + o)))
    return found
