"""A small attention whose kept copies are joined, made together and share their input, against float64."""

from __future__ import annotations

import copy

import torch
from support import relative_error
from torch import Tensor, nn

import fastspec
from fastspec.model.targets import spectral_layers
from fastspec.nn import together
from gpu import calls, device
from gpu.device import DEVICE, pick

NAMES = ("query", "key", "value", "out", "up", "down")
CHANGES = 3  # of the coefficients, past the version counters


class Block(nn.Module):
    """Layers of three kinds, three of them on the same x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        heads = [t.unflatten(-1, (2, -1)).transpose(-3, -2) for t in (q, k, v)]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        y = self.out(mixed.transpose(-3, -2).flatten(-2)) + x
        return self.down(torch.tanh(self.up(y))) + y


def block(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Block(pick(256, 32)).to(dtype)
    rank = pick(32, 5)
    config = fastspec.SpectralConfig(rank, target_modules=list(NAMES), modules_to_save=[])
    return fastspec.keep_merged(fastspec.spectralize(model, config, progress=False))


def change(model: nn.Module, seed: int) -> None:
    """Other coefficients, as a fused optimiser or the replay of a graph writes them."""
    gen = torch.Generator().manual_seed(seed)
    for _, layer in spectral_layers(model):
        layer.delta.data.copy_(0.1 * torch.randn(layer.delta.shape, generator=gen))


def gradients(model: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """y, dx and the gradients of all coefficients."""
    y = model(x)
    wanted = [x, *(layer.delta for _, layer in spectral_layers(model))]
    return [y, *torch.autograd.grad(y, wanted, g)]


def exact(model: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """The same by the plain formulas in float64."""
    plain = fastspec.keep_merged(copy.deepcopy(model), False)
    for (_, layer), (_, own) in zip(spectral_layers(plain), spectral_layers(model), strict=True):
        layer.path = "reference"
        layer.delta.data = own.delta.detach().double()
    return gradients(plain.double(), x.detach().double().requires_grad_(), g.double())


def copies(dtype: torch.dtype, how: str) -> tuple[dict[str, float], float]:
    """The largest errors over some changes of the coefficients, eager or by one graph's replays."""
    with device.as_on_card():
        model = block(dtype)
        x = torch.randn((*pick((4, 70), (2, 5)), model.query.in_features), device=DEVICE).to(dtype)
        g = torch.randn_like(x)
        x.requires_grad_()

        def step() -> list[Tensor]:
            return gradients(model, x, g)

        run = device.graphed(step) if how == "graphed" else step
        found: dict[str, float] = {}
        for seed in range(CHANGES):
            change(model, seed)
            for _ in range(3):  # the first forwards learn
                results = run()
            names = ("y", "dx", *NAMES)
            for name, got, full in zip(names, results, exact(model, x, g), strict=True):  # type: ignore[call-overload]
                found[name] = max(found.get(name, 0.0), relative_error(got, full))
        if dtype.itemsize == 2 and not together._known[model].sharing.groups:
            raise AssertionError("query, key and value did not share a product")
    # three rounded layers follow each other
    return found, 3 * calls.tolerance(dtype)
