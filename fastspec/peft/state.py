"""What a layer holds for its adapters: shared frozen factors, and float32 coefficients."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from fastspec.cores import Core
from fastspec.model.buffers import DIGITS
from fastspec.nn.parts import FrozenFactors, kept_in_float32
from fastspec.peft.config import SpectralConfig
from fastspec.svd.factors import Directions, Factors, factorize


class FrozenBasis(FrozenFactors):
    """The factors of one weight: u [out, k], s [k], vh [k, in].

    Adapters of one layer whose directions it covers share it, and so do layers that share a weight.
    `fingerprint` is that of the weight it was made from.
    """

    def __init__(self, factors: Factors, directions: Directions, fingerprint: str) -> None:
        super().__init__()
        self.directions = directions
        self.fingerprint = fingerprint
        self._hold(factors)

    def made_again(self, matrix: Tensor, fingerprint: str) -> FrozenBasis:
        """The same directions of another weight [out, in]."""
        (factors,) = factorize([matrix], [self.directions], ["weight"])
        return FrozenBasis(factors, self.directions, fingerprint)

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

    def extra_repr(self) -> str:
        d = self.directions
        dtype = str(self.u.dtype).removeprefix("torch.")
        return f"rank={d.rank}, select={d.select}, basis={d.basis}, dtype={dtype}"


class BaseWeights:
    """What an adapter's bases were made from: fingerprints by layer, whose first digits its config tells."""

    def __init__(self, config: SpectralConfig, fingerprints: dict[str, str]) -> None:
        self.config, self.fingerprints = config, fingerprints

    def changed(self, layer: str, fingerprint: str) -> None:
        self.fingerprints[layer] = fingerprint
        self.config.base_fingerprint = {n: f[:DIGITS] for n, f in self.fingerprints.items()}


class Coefficients(nn.ParameterDict):
    """Adapter name to coefficients, which stay float32 whatever the model is cast to (design section 1)."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with kept_in_float32(self, self.keys()):
            return super()._apply(fn, recurse)


@dataclasses.dataclass(frozen=True)
class Form:
    """How an adapter uses its basis: the kind of core, and the first of its triplets there."""

    core: Core
    offset: int
