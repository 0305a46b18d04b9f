"""Ranks by gradient energy: a budget of coefficients goes to the layers whose gradient is largest."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastspec.config import SpectralConfig
from fastspec.cores import delta_shape
from fastspec.model.convert import spectralize
from fastspec.model.targets import find_targets, spectral_layers


def coefficient_energy(
    model: nn.Module,
    config: SpectralConfig,
    batches: Iterable[Mapping[str, Tensor]],
) -> dict[str, float]:
    """Squared norm of the gradient of every layer's coefficients at zero, summed over batches.

    Args:
        model: the plain model; it is not changed.
        config: the adaptation whose coefficients are meant.
        batches: keyword arguments of the model, which returns a loss: those of `transformers` do.
    """
    model = spectralize(copy.deepcopy(model), config).eval()
    layers = dict(spectral_layers(model))
    energy = dict.fromkeys(layers, 0.0)
    for batch in batches:
        found = torch.autograd.grad(model(**batch).loss, [layer.delta for layer in layers.values()])
        for name, gradient in zip(layers, found, strict=True):
            energy[name] += gradient.double().square().sum().item()
    return energy


def allocate(
    model: nn.Module, config: SpectralConfig, energy: Mapping[str, float]
) -> dict[str, int]:
    """Ranks of the layers, whose coefficients are as many as those of `config` and go by `energy`.

    A layer gets the largest rank whose core needs no more numbers than its share of the energy allows, at
    most min(in, out); where that is none, it is left out.

    Returns:
        Rank by layer, 0 for those left out; `patterns` makes a `SpectralConfig`'s of them.
    """
    targets, _ = find_targets(model, config)
    budget = sum(_numbers(config, t.directions.rank) for t in targets)
    whole = sum(energy.values())
    ranks = {}
    for target in targets:
        share = budget * energy[target.name] / whole
        rank = (
            math.isqrt(int(share)) if config.core == "dense" else int(share / _numbers(config, 1))
        )
        ranks[target.name] = min(rank, *target.matrix.shape)
    return ranks


def patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """The `rank` of a `SpectralConfig` that gives layers these ranks and leaves those of rank 0 plain."""
    return {f"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank}


def _numbers(config: SpectralConfig, rank: int) -> int:
    return math.prod(delta_shape(config.core, rank, config.half_width, config.core_rank))
