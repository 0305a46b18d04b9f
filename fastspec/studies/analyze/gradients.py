"""Spectra of the gradient summed over training: how many directions a task asks to move."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastspec.studies.analyze.alignment import decompose
from fastspec.studies.analyze.weights import pairs


@dataclasses.dataclass(frozen=True)
class GradientSpectrum:
    """The gradient of one matrix summed over the steps up to `step`.

    Attributes:
        name, kind, layer, shape: of the matrix.
        step: optimiser steps summed.
        s: [k] singular values of the sum.
        captured: [k] share of its squared norm in the leading r x r block of the basis that the matrix
            had at the first step, |U_r^T G V_r|_F^2 / |G|_F^2 for r = i + 1.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    step: int
    s: Tensor
    captured: Tensor

    def effective_rank(self) -> float:
        """(sum s)^2 / sum s^2: the number of equal singular values that would have these sums."""
        s = self.s.double()
        return float(s.sum().square() / s.square().sum())

    def summary(self) -> dict[str, Any]:
        """One line of a table."""
        tenth = max(1, len(self.s) // 10)
        return {
            "matrix": self.name.removesuffix(".weight"),
            "kind": self.kind,
            "layer": "" if self.layer is None else self.layer,
            "step": self.step,
            "s1": float(self.s[0]),
            "effective rank": self.effective_rank(),
            "of": len(self.s),
            "in W's leading tenth": float(self.captured[tenth - 1]),
        }


class CumulativeGradients(TrainerCallback):
    """Sums the gradients of a model's matrices during a `transformers.Trainer`'s training.

    A gradient is added as the optimiser gets it, after clipping. `spectra` holds a `GradientSpectrum` per
    matrix and recorded step after training.

    Args:
        steps: optimiser steps after which the sum's spectrum is taken; the last one always is.
    """

    def __init__(self, steps: tuple[int, ...] = (1, 10, 100)) -> None:
        self.steps = frozenset(steps)
        self.spectra: list[GradientSpectrum] = []
        self._sums: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        names = [p.name for p in pairs(weights, weights)]
        self._start = {n: weights[n].detach().clone() for n in names}
        self._sums = {n: torch.zeros_like(w) for n, w in self._start.items()}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.add(model)
        if state.global_step + 1 in self.steps:
            self.record(state.global_step + 1)

    def on_train_end(self, args, state, control, **kwargs):
        if not self.spectra or self.spectra[-1].step != state.global_step:
            self.record(state.global_step)

    def add(self, model: nn.Module) -> None:
        for name, total in self._sums.items():
            grad = model.get_parameter(name).grad
            if grad is not None:
                total += grad

    def record(self, step: int) -> None:
        """Append the spectra of the sums as they are."""
        self.spectra += spectra(self._start, self._sums, step)


def spectra(
    weights: Mapping[str, Tensor], sums: Mapping[str, Tensor], step: int
) -> list[GradientSpectrum]:
    """`GradientSpectrum` of every matrix, from the weights at the start and the summed gradients."""
    found = pairs(weights, sums)
    bases = decompose([p.before for p in found])
    sizes = decompose([p.after for p in found])
    out = []
    for pair, basis, svd in zip(found, bases, sizes, strict=True):
        block = (basis.u.mT @ pair.after @ basis.vh.mT).double()
        energy = block.square().cumsum(0).cumsum(1).diagonal()
        whole = svd.s.double().square().sum()
        captured = energy / whole if whole > 0 else torch.zeros_like(energy)
        m, n = pair.before.shape
        out.append(
            GradientSpectrum(pair.name, pair.kind, pair.layer, (m, n), step, svd.s, captured)
        )
    return out
