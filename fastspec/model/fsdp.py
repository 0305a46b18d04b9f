"""FSDP2 (`fully_shard`): its sharded tensors in adapters, and the factors sharded along with the weights.

DDP and `fully_shard` take a spectralized model as it is. See docs/distributed.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastspec.model.targets import spectral_layers

FACTORS = ("u", "vh")


def shard_factors(model: nn.Module) -> nn.Module:
    """Let a following `fully_shard` shard the factors `u` and `vh` along with the weights.

    FSDP2 shards parameters and replicates buffers, and the factors are buffers. Replicated, they cost every
    process k (in + out) numbers a layer, which is little beside in * out at a small rank and needs no
    communication; at a high rank, or over many processes, they become the larger part of what one holds.
    Here they become frozen parameters, gathered with the weight of their block. They stay outside the
    state dict.

    Args:
        model: a spectralized model, unmerged, before `fully_shard`; changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no adapted layers, or one is merged.
    """
    layers = list(spectral_layers(model))
    if not layers:
        raise ValueError("the model has no adapter: call fastspec.spectralize(model, config) first")
    merged = next((name for name, layer in layers if layer.merged), None)
    if merged is not None:
        raise ValueError(f"{merged} is merged: call fastspec.unmerge(model) first")
    for _, layer in layers:
        for name in FACTORS:
            factor = layer._buffers.pop(name)
            layer._non_persistent_buffers_set.discard(name)
            if factor is not None:
                layer.register_parameter(name, nn.Parameter(factor, requires_grad=False))
        layer.register_state_dict_post_hook(_without_factors)
        layer.register_load_state_dict_post_hook(_no_factors_expected)
    return model


def _without_factors(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in FACTORS:
        state.pop(prefix + name, None)


def _no_factors_expected(layer: nn.Module, keys: Any) -> None:
    missing = [key for key in keys.missing_keys if key.rpartition(".")[2] not in FACTORS]
    keys.missing_keys[:] = missing


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, asked without importing torch.distributed."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full value of a sharded tensor, for which every process must call this; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a full `value` into `target`, of which each process may hold a shard (it takes its own)."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
        value = value.to(target.device)
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    target.copy_(value)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop the gathered parameters a forward pass left, so that names mean the shards again."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()  # type: ignore[operator]
