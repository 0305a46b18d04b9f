"""What a layer holds for its adapters: shared frozen factors, and float32 coefficients."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.cores import Core
from fastspec.svd.factors import Directions, Factors


class FrozenBasis(nn.Module):
    """The factors of one weight: u [out, k], s [k], vh [k, in], outside the state dict.

    Adapters of one layer whose directions it covers share it, and so do layers that share a weight.
    `fingerprint` is that of the weight it was made from.
    """

    u: Tensor
    s: Tensor
    vh: Tensor

    def __init__(self, factors: Factors, directions: Directions, fingerprint: str) -> None:
        super().__init__()
        self.directions = directions
        self.fingerprint = fingerprint
        self.register_buffer("u", factors.u, persistent=False)
        self.register_buffer("s", factors.s, persistent=False)
        self.register_buffer("vh", factors.vh, persistent=False)
        # a cast rounds the factors: W V = U S then no longer holds to rounding (design F3)
        self._made_in = factors.u.dtype if factors.singular else None

    @property
    def singular(self) -> bool:
        """Whether `W V = U S` still holds to rounding."""
        return self._made_in in (torch.float32, torch.float64)

    def offset_of(self, wanted: Directions) -> int | None:
        """Where the triplets of `wanted` begin in this basis; None if it does not hold them all."""
        have = self.directions
        if wanted == have:
            return 0
        alike = (have.basis, have.tol, have.seed) == (wanted.basis, wanted.tol, wanted.seed)
        if have.basis == "random" or not alike:
            return None
        short_side = min(self.u.shape[0], self.vh.shape[1])
        (start, stop), (a, b) = have.triplets(short_side), wanted.triplets(short_side)
        return a - start if start <= a and b <= stop else None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        s = self.s
        super()._apply(fn, recurse)
        if self.s.dtype.itemsize < 4:
            self.s = s.to(self.s.device)
        if self.u.dtype != self._made_in:
            self._made_in = None
        return self

    def extra_repr(self) -> str:
        d = self.directions
        dtype = str(self.u.dtype).removeprefix("torch.")
        return f"rank={d.rank}, select={d.select}, basis={d.basis}, dtype={dtype}"


class Coefficients(nn.ParameterDict):
    """Adapter name to coefficients, which stay float32 whatever the model is cast to (design section 1)."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {
            name: (p.data, None if p.grad is None else p.grad.data) for name, p in self.items()
        }
        super()._apply(fn, recurse)
        for name, p in self.items():
            if p.dtype != torch.float32:
                data, grad = before[name]
                p.data = data.to(p.device)
                if grad is not None:
                    p.grad = grad.to(p.device)
        return self


@dataclasses.dataclass(frozen=True)
class Form:
    """How an adapter uses its basis: the kind of core, and the first of its triplets there."""

    core: Core
    offset: int
