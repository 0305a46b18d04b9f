"""A weighted sum of adapters as one, where that is exact: U (sum_i w_i C_i) Vh = sum_i w_i U C_i Vh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from fastspec.cores import summed
from fastspec.peft.config import SpectralConfig
from fastspec.peft.layer import SpectralLinear

SAME = ("core", "half_width", "select", "basis", "tol", "seed")  # what gives coefficients a meaning


def summed_config(
    model: nn.Module,
    configs: Mapping[str, SpectralConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
) -> SpectralConfig:
    """The config of the sum of `adapters`, which names every layer that one of them has.

    Raises:
        ValueError: the sum would not be exact, or a name or weight is none; the message says why.
    """
    if not adapters or len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(
            f"expected as many finite weights as adapters, and one at least, got {list(weights)} for "
            f"{list(adapters)}"
        )
    for adapter in adapters:
        if adapter not in configs:
            raise ValueError(f"Adapter {adapter} does not exist; there are {', '.join(configs)}")
        if configs[adapter].bias != "none":
            raise ValueError(f"the adapter {adapter!r} trains biases, which do not add up")
    first = configs[adapters[0]]
    for field in SAME:
        values = {adapter: getattr(configs[adapter], field) for adapter in adapters}
        if any(value != getattr(first, field) for value in values.values()):
            raise ValueError(
                f"coefficients add up only in one basis and one kind of core, but {field} differs: {values}"
            )
    ranks: dict[str, int] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SpectralLinear):
            continue
        shapes = {a: layer.fastspec_delta[a].shape for a in adapters if a in layer.fastspec_delta}
        if first.core == "low_rank":  # factors are put side by side
            shapes = {a: shape[1:] for a, shape in shapes.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"{name}: coefficients add up only in one basis, but the shapes differ: "
                f"{ {a: list(shape) for a, shape in shapes.items()} }"
            )
        if shapes:
            ranks[name] = next(iter(shapes.values()))[-1]
    saved = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            having = [a for a in dict.fromkeys(adapters) if a in module.modules_to_save]
            if len(having) > 1:
                raise ValueError(
                    f"{', '.join(having)} have each a {name!r} of their own, and modules that are trained "
                    "whole do not add up: their outputs are not linear in what they hold"
                )
            saved += [name] * len(having)
    low_rank = first.core == "low_rank"
    config = dataclasses.replace(
        first,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        base_fingerprint=None,
        core_rank=sum(configs[a].core_rank for a in adapters) if low_rank else first.core_rank,
    )
    config.name_layers(ranks, saved)
    return config


def sum_into(
    model: nn.Module, name: str, adapters: Sequence[str], weights: Sequence[float]
) -> None:
    """Give the new adapter `name` the sum of coefficients, and the heads that one of `adapters` has."""
    for module in model.modules():
        if isinstance(module, SpectralLinear) and name in module.fastspec_delta:
            deltas, core = module.fastspec_delta, module.fastspec_form[name].core
            terms = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in deltas]
            total = summed([deltas[a].detach() for a, _ in terms], [w for _, w in terms], core)
            room = deltas[name].data.zero_()
            # of a low-rank core, whose sum has fewer rows where the layer has fewer of the adapters
            halves = (room.chunk(2), total.chunk(2)) if core == "low_rank" else ([room], [total])
            for into, part in zip(*halves, strict=True):
                into[: len(part)].copy_(part)
        elif isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            (source,) = {a for a in adapters if a in module.modules_to_save}
            state = module.modules_to_save[source].state_dict()
            module.modules_to_save[name].load_state_dict(state)
