"""`FollowsWeight`: factors that are those of the weight as it is, whoever changes it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastspec.nn.made_from import MadeFrom, Seen, came_along, readable
from fastspec.nn.parts import FrozenFactors
from fastspec.svd.factors import Directions, Factors, factorize


class FollowsWeight(FrozenFactors):
    """The part of `SpectralLayer` that knows what its factors were made from, and notices changes of it."""

    weight: Any  # Tensor
    base_weight: Tensor | None  # the unmerged weight, while `weight` is a merged one
    delta: Tensor
    directions: Directions
    _kept: Any
    _made_from: MadeFrom  # the unmerged weight
    _merged_seen: Seen  # the merged one

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        """The stored weight as a view [out, in]."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether `weight` holds W + U C Vh at the moment (see `merge`)."""
        return self.base_weight is not None

    @property
    def _base(self) -> Tensor:
        """The unmerged weight as it is stored."""
        return self.weight if self.base_weight is None else self.base_weight  # type: ignore[no-any-return]

    def merge(self) -> None:
        raise NotImplementedError

    def _follow(self, factors: Factors | None) -> None:
        """Take the factors of the weight, or make them, now or as soon as it has values."""
        self._made_from, self._merged_seen = MadeFrom(), Seen()
        matrix = self._matrix(self.weight)
        if factors is not None:
            self._hold(factors)
            self._made_from = MadeFrom(self.weight)
        elif matrix.device.type == "meta":
            self._hold(Factors.empty(matrix, self.directions.rank))
        else:
            self.refactorize()

    def refactorize(self) -> None:
        """Make the factors again from the weight as it is now. The coefficients stay as they are.

        A weight that is changed in place, or replaced, is noticed at the next call of the layer, which does
        this. A write through `weight.data` is not: call this after one.

        Raises:
            ValueError: the weight is not finite, or the factors are sharded along with it.
        """
        self.unmerge()
        self._kept = None
        weight = self.weight
        matrix = self._matrix(weight.detach())
        self._hold(factorize([matrix], [self.directions], ["weight"])[0])
        self._made_from = MadeFrom(weight)

    def follow_weight(self) -> Tensor:
        """The unmerged weight, its factors made again if it is no longer what they were made from."""
        if not torch.compiler.is_compiling() and not self._made_from.unchanged(self._base):
            self._compare()
        return self._base

    def basis_of(self, fingerprint: str) -> bool | None:
        """Whether the factors are of the weight with this fingerprint; None: of that before a cast."""
        made = self._made_from
        if made.original in (None, fingerprint):
            return True
        return None if made.fingerprint == fingerprint else False

    def _compare(self) -> None:
        """Read a weight that may have changed, and make the factors again if it has."""
        weight, made = self._base, self._made_from
        # a weight that is trained runs the plain formula, which is right with any U and Vh
        trained = weight.requires_grad and made.fingerprint is not None
        if trained or not readable(weight) or getattr(self, "_is_replica", False):
            return
        if made.same_content(weight):
            return
        if made.fingerprint is not None and bool(self.delta.detach().any()):
            warnings.warn(
                f"the weight {list(weight.shape)} of a spectral layer has changed since its factors were "
                "made: they are made again, and its coefficients, which are not zero, act in another "
                "basis from here on; load the adapter again, or zero `delta`",
                stacklevel=2,
            )
        merged = self.merged
        self.refactorize()
        if merged:
            self.merge()

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit.

        Raises:
            ValueError: `weight` was changed in place while it was merged, which would be lost.
        """
        if self.merged:
            self.check_merged()
            self._drop_merged()

    def _drop_merged(self) -> None:
        if self.merged:
            self.weight, self.base_weight = self.base_weight, None

    def check_merged(self) -> None:
        if self.merged and self._merged_seen.written(self.weight):
            raise ValueError(
                f"a weight {list(self.weight.shape)} was changed in place while it was merged, which "
                "unmerging and state dicts would lose: fastspec.merge_and_unload(model) keeps it"
            )

    def _replicate_for_data_parallel(self) -> Any:
        if not self._made_from.unchanged(self._base) and not self._made_from.same_content(
            self._base
        ):
            raise ValueError(
                f"the weight {list(self._base.shape)} of a spectral layer has changed since its factors were "
                "made: call its refactorize() before nn.DataParallel copies them"
            )
        return super()._replicate_for_data_parallel()  # type: ignore[misc]

    @contextlib.contextmanager
    def _moved(self) -> Iterator[None]:
        """Around a move or cast: the factors are then of the weight that came out of it."""
        s, dtype = self.s, self.follow_weight().dtype
        merged_seen = self._merged_seen.unchanged(self.weight) if self.merged else False
        yield
        weight = self._base
        if merged_seen:
            self._merged_seen = Seen(self.weight)
        if not came_along([s], [self.s]):
            self._made_from = MadeFrom()
        elif self._made_from.fingerprint is not None and readable(weight):
            if weight.dtype == dtype:
                self._made_from.look(weight)
            else:
                self._made_from = MadeFrom(weight, original=self._made_from.original)
