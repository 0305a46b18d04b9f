"""Cores under trial: dense cores made from fewer numbers, and any core in proportion to the spectrum.

A map stands before `layer.delta` as a parametrisation of torch's. A layer multiplies by the dense core
it gives, so a step takes longer than it would with a path of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastspec.cores import core_storage
from fastspec.model.targets import spectral_layers
from fastspec.nn.layer import SpectralLayer

TIED_PER_LAYER = 3456  # as many as a band of half-width 4 has on a matrix of MiniLM's


class CoreMap(nn.Module):
    """`forward` makes the core [k, k] of what is trained; `right_inverse` gives that a core of zeros."""

    s: Tensor

    def __init__(self, layer: SpectralLayer) -> None:
        super().__init__()
        self.register_buffer("s", layer.s.clone(), persistent=False)


class Hartley(CoreMap):
    """sum over m of diag(a_m) H_m diag(b_m), and diag(d): every pair of directions is coupled.

    H is the discrete Hartley transform, orthogonal and of any order, where RaSTA has a Hadamard matrix.
    H_m has its columns shuffled, but for m = 0.
    """

    transforms: Tensor

    def __init__(self, layer: SpectralLayer, terms: int = 1, diagonal: bool = False) -> None:
        super().__init__(layer)
        self.diagonal = diagonal
        k = layer.rank
        angle = torch.outer(torch.arange(k), torch.arange(k)).remainder(k) * (2 * torch.pi / k)
        transform = (angle.cos() + angle.sin()) / k**0.5
        generator = torch.Generator().manual_seed(0)
        orders = [torch.arange(k)] + [
            torch.randperm(k, generator=generator) for _ in range(terms - 1)
        ]
        shuffled = torch.stack([transform[:, order] for order in orders])
        self.register_buffer("transforms", shuffled, persistent=False)

    def right_inverse(self, delta: Tensor) -> tuple[Tensor, ...]:
        left = torch.zeros(len(self.transforms), len(delta))
        right = torch.ones_like(left)
        return (left, right, torch.zeros(len(delta))) if self.diagonal else (left, right)

    def forward(self, left: Tensor, right: Tensor, *diagonal: Tensor) -> Tensor:
        core = torch.einsum("mi,mij,mj->ij", left, self.transforms, right)
        return core + torch.diag(diagonal[0]) if diagonal else core


class Cayley(CoreMap):
    """diag(a) R diag(b) S - S, R orthogonal: (1 - Q)^-1 (1 + Q) of a skew Q (PSOFT, arXiv 2505.11235)."""

    def right_inverse(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k = len(delta)
        return torch.zeros(k * (k - 1) // 2), torch.ones(k), torch.ones(k)

    def forward(self, angles: Tensor, left: Tensor, right: Tensor) -> Tensor:
        k = len(left)
        rows, columns = torch.triu_indices(k, k, 1, device=left.device)
        upper = angles.new_zeros(k, k).index_put((rows, columns), angles)
        skew, one = upper - upper.mT, torch.eye(k, dtype=left.dtype, device=left.device)
        rotation = torch.linalg.solve(one - skew, one + skew)
        return left[:, None] * rotation * (right * self.s) - torch.diag(self.s)


class Scaled(CoreMap):
    """Any core, whose rows or columns move in proportion to the singular values: U's side, or V's."""

    scale: Tensor

    def __init__(self, layer: SpectralLayer, side: str) -> None:
        super().__init__(layer)
        one, scale = torch.ones_like(self.s), self.s / self.s.mean()
        outer = torch.outer(scale, one) if side == "left" else torch.outer(one, scale)
        self.register_buffer(
            "scale", core_storage(outer, layer.core, layer.half_width), persistent=False
        )

    def right_inverse(self, delta: Tensor) -> Tensor:
        return delta

    def forward(self, core: Tensor) -> Tensor:
        return core * self.scale


class Tied(CoreMap):
    """Every number of every core is one of a few that all layers share, by a fixed draw (Uni-LoRA)."""

    of: Tensor
    sign: Tensor

    def __init__(
        self, layer: SpectralLayer, shared: nn.Parameter, generator: torch.Generator
    ) -> None:
        super().__init__(layer)
        self.shared = shared
        cells = layer.rank * layer.rank
        self.register_buffer(
            "of", torch.randint(len(shared), (cells,), generator=generator), persistent=False
        )
        self.register_buffer(
            "sign", torch.randint(2, (cells,), generator=generator) * 2.0 - 1, persistent=False
        )

    def right_inverse(self, delta: Tensor) -> Tensor:
        self.k = len(delta)
        return torch.zeros(0)

    def forward(self, none: Tensor) -> Tensor:
        return (self.shared[self.of] * self.sign).view(self.k, self.k)


MAPS: Mapping[str, Callable[[SpectralLayer], CoreMap]] = {
    "hartley": Hartley,
    "hartley-diagonal": functools.partial(Hartley, diagonal=True),
    "hartley-4": functools.partial(Hartley, terms=4),
    "cayley": Cayley,
    "left": functools.partial(Scaled, side="left"),
    "right": functools.partial(Scaled, side="right"),
}


def install(model: nn.Module, name: str) -> nn.Module:
    """Let a map make the cores of a spectralized model; all but "left" and "right" make dense ones alone."""
    layers = [layer for _, layer in spectral_layers(model)]
    if name == "tied":
        shared = nn.Parameter(torch.zeros(TIED_PER_LAYER * len(layers)))
        draw = torch.Generator().manual_seed(0)
        make: Callable[[SpectralLayer], CoreMap] = functools.partial(
            Tied, shared=shared, generator=draw
        )
    else:
        make = MAPS[name]
    for layer in layers:
        parametrize.register_parametrization(layer, "delta", make(layer))
    return model
