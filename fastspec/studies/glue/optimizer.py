"""Learning rates relative to the spectrum: AdamW whose steps are scaled number by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.cores import core_storage
from fastspec.model.targets import spectral_layers
from fastspec.nn.layer import SpectralLayer


class ScaledAdamW(torch.optim.AdamW):
    """AdamW that moves a parameter by `scale` times AdamW's own step.

    That is AdamW on theta with p = scale * theta, for its step does not depend on a constant factor of
    the gradient.

    Args:
        groups: as for `torch.optim.AdamW`.
        scales: scale by parameter, of its shape; parameters without one are stepped as always.
    """

    def __init__(self, groups: Any, scales: Mapping[Tensor, Tensor]) -> None:
        self.scales = dict(scales)
        super().__init__(groups)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [(p, p.clone(), scale) for p, scale in self.scales.items()]
        loss = super().step(closure)
        for p, old, scale in before:
            p.copy_(old.lerp(p, scale.to(p)))
        return loss


def spectral_scale(layer: SpectralLayer) -> Tensor:
    """sqrt(s_i s_j) for the place (i, j) of the core, over its mean, in the storage of `layer.delta`."""
    root = layer.s.clamp_min(0).sqrt()
    outer = torch.outer(root, root)
    trained = core_storage(torch.ones_like(outer), layer.core, layer.half_width)
    scale = core_storage(outer, layer.core, layer.half_width)
    return scale * (trained.sum() / scale.sum())


def spectral_scales(model: nn.Module) -> dict[Tensor, Tensor]:
    """`spectral_scale` of every adapted layer, by its coefficients."""
    return {layer.delta: spectral_scale(layer) for _, layer in spectral_layers(model)}
