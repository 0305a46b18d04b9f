"""`KeptCopy`: one merged copy of a layer's weight between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastspec.cores import Core
from fastspec.nn.kept_weight import KeptWeight, kept_weight
from fastspec.nn.parts import FrozenFactors
from fastspec.ops.plan import Plan


class KeptCopy(FrozenFactors):
    """The part of `SpectralLayer` that keeps W + U C Vh, which says by `_merged_weight` what that is."""

    weight: Any  # Tensor
    delta: Tensor
    core: Core
    forced_plan: Plan | None
    # W + U C Vh and the coefficients it is for; in 16 bits or on a device, whoever compares them there
    _kept: tuple[Tensor, Tensor] | KeptWeight | None

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        """The stored weight as a view [out, in]."""
        raise NotImplementedError

    def _merged_weight(self) -> Tensor:
        raise NotImplementedError

    def keep_merged(self, keep: bool = True) -> None:
        """Keep one copy of W + U C Vh between calls, made again only when the coefficients changed.

        It saves both merges of a step: for evaluation, and for training where many batches pass between
        two optimiser steps. It costs the memory of one more weight. In 16 bits and on a GPU it replaces the
        two thin products that a layer adds: a wide layer's step then costs little more than the frozen
        one's. In 16 bits each entry of the copy is rounded up or down by a threshold of its own
        (`fastspec.ops.kept`). A CUDA graph holds the comparison, so that its replays see new coefficients.

        It has no effect under autocast, while compiling, with a forced plan, and, in 16 bits or on a GPU,
        with a band or low-rank core. In float64 on a GPU every call makes the copy.
        """
        self.keeps_merged = keep
        self._kept = None

    def _kept_weight(self) -> Tensor | None:
        """W + U C Vh as a view [out, in], refreshed where needed; None where it is not to be used."""
        weight, delta = self.weight, self.delta.detach()
        if (
            torch.compiler.is_compiling()
            or self.forced_plan is not None
            or torch.is_autocast_enabled(weight.device.type)
        ):
            return None
        if weight.device.type != "cpu" or weight.dtype.itemsize < 4:
            on_device = kept_weight(self)
            return None if on_device is None else on_device.effective
        if not delta.any():
            return self._matrix(weight)  # bit for bit the pretrained layer, without a copy
        kept = self._kept
        if not isinstance(kept, tuple) or not torch.equal(kept[1], delta):
            # a new tensor: a graph may still hold the old one for its backward
            with torch.inference_mode(False):  # kept beyond it, for training too
                self._kept = kept = (self._merged_weight(), delta.clone())
        return self._matrix(kept[0])
