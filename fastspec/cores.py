"""The k x k core C between the frozen bases: its kinds, and how the trained storage `delta` stands for it.

    core       delta         C
    diag       [k]           diag(delta)
    band       [2h + 1, k]   C[i, i + o] = delta[h + o, i] for |o| <= h; places outside C are ignored
    dense      [k, k]        delta
    low_rank   [2r, k]       2 A^T (B0 + B), A and B the upper and the lower r rows of delta

A low-rank core is LoRA's update in the coordinates of the basis, with its scale of 2. Its B0 [r, k] is fixed
(`low_rank_start`), so that C starts at zero with delta and still has a gradient.

Source: arXiv 2605.07302 (diag), SVFT arXiv 2405.19597 (band), LoRA-XS arXiv 2405.17604 (dense), LoRA
arXiv 2106.09685 (low_rank).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Core = Literal["diag", "band", "dense", "low_rank"]
# C is linear in delta: the cores of the operators that multiply by U and Vh
LINEAR = ("diag", "band", "dense")
CORES = (*LINEAR, "low_rank")

LOW_RANK_SCALE = 2.0


def delta_shape(core: str, k: int, half_width: int = 1, core_rank: int = 1) -> tuple[int, ...]:
    """The shape of the trained storage of a core of order k."""
    return {
        "diag": (k,),
        "band": (2 * half_width + 1, k),
        "dense": (k, k),
        "low_rank": (2 * core_rank, k),
    }[core]


def label(core: str, delta: Tensor) -> str:
    """The kind of core with its size, as models print it: `band(4)`, `low_rank(1)`."""
    if core not in ("band", "low_rank"):
        return core
    return f"{core}({delta.shape[-2] // 2})"


def hashed(count: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [count], uniform in [0, 2**32): the hash `lowbias32` of 0, 1, ... count - 1.

    Source: https://nullprogram.com/blog/2018/07/31/.
    """
    h = torch.arange(count, device=device) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def low_rank_start(r: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """B0 [r, k] in float64: uniform in +-1 / sqrt(k) as LoRA's A starts, the same for every layer, ever."""
    share = (hashed(r * k, device).view(r, k).double() + 0.5) / 2**31 - 1
    return share / k**0.5


def low_rank_parts(delta: Tensor) -> tuple[Tensor, Tensor]:
    """2 A and B0 + B, each [..., r, k] and differentiable: C is the first's transpose times the other."""
    a, b = delta.chunk(2, -2)
    return LOW_RANK_SCALE * a, b + _start(b).to(b.dtype)


def low_rank_storage(left: Tensor, right: Tensor) -> Tensor:
    """The storage [2r, k] of C = left^T right, both [r, k]; inverse of `low_rank_parts`."""
    return torch.cat([left / LOW_RANK_SCALE, right - _start(right).to(right.dtype)])


_starts: dict[tuple[int, int, torch.device], Tensor] = {}


def _start(like: Tensor) -> Tensor:
    """B0 for `like` [..., r, k], made once."""
    key = (*like.shape[-2:], like.device)
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or type(like.data) is not Tensor or like.is_meta:
        return low_rank_start(*key)  # of a tracer, which may not outlive it
    if key not in _starts:
        with torch.inference_mode(False):  # used in training too
            _starts[key] = low_rank_start(*key)
    return _starts[key]


def core_matrix(delta: Tensor, core: str) -> Tensor:
    """The k x k core C that the storage `delta` stands for."""
    if core == "diag":
        return torch.diag(delta)
    if core == "dense":
        return delta
    if core == "low_rank":
        left, right = low_rank_parts(delta)
        return left.mT @ right
    width, k = delta.shape  # band
    h = width // 2
    c = delta.new_zeros(k, k)
    for o in range(max(-h, 1 - k), min(h, k - 1) + 1):
        values = delta[h + o, max(0, -o) : k - max(0, o)]
        c = c + torch.diag_embed(values, offset=o)
    return c


def core_storage(c: Tensor, core: str, half_width: int = 1) -> Tensor:
    """The entries of a k x k matrix that a linear core trains, in its storage; inverse of `core_matrix`.

    Raises:
        ValueError: the core is not linear in its storage.
    """
    if core not in LINEAR:
        raise ValueError(f"a core of kind {core!r} does not train entries of its matrix")
    if core == "diag":
        return c.diagonal().clone()
    if core == "dense":
        return c
    k = c.shape[0]
    out = c.new_zeros(2 * half_width + 1, k)
    for o in range(max(-half_width, 1 - k), min(half_width, k - 1) + 1):
        out[half_width + o, max(0, -o) : k - max(0, o)] = c.diagonal(o)
    return out


def summed(deltas: Sequence[Tensor], weights: Sequence[float], core: str) -> Tensor:
    """The storage of sum_i w_i C_i; that of a low-rank core has as many rows as all together."""
    if core == "low_rank":
        lefts, rights = zip(*map(low_rank_parts, deltas), strict=True)
        scaled = [w * left for w, left in zip(weights, lefts, strict=True)]
        return low_rank_storage(torch.cat(scaled), torch.cat(rights))
    total = weights[0] * deltas[0]
    for w, d in zip(weights[1:], deltas[1:], strict=True):
        total = torch.add(total, d, alpha=w)
    return total


def core_gradient(dc: Tensor, delta: Tensor, core: str) -> Tensor:
    """dL/d delta in its shape, from dL/dC [k, k]."""
    if core != "low_rank":
        return core_storage(dc, core, delta.shape[0] // 2)
    left, right = low_rank_parts(delta)
    return torch.cat([LOW_RANK_SCALE * right @ dc.mT, left @ dc])


def diagonals(width: int, k: int) -> list[tuple[int, slice, slice]]:
    """Of a band [width, k] of order k: every diagonal's row in the storage, its rows and columns of C."""
    h = width // 2
    found = []
    for o in range(max(-h, 1 - k), min(h, k - 1) + 1):
        i = slice(max(0, -o), k - max(0, o))
        found.append((h + o, i, slice(i.start + o, i.stop + o)))
    return found
