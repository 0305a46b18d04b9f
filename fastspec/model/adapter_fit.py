"""Whether an adapter folder fits a model: its config, its layers, and the tensors it must hold."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.config import SpectralConfig
from fastspec.cores import delta_shape
from fastspec.files import excerpt
from fastspec.model.adapter_file import AdapterError, Expected
from fastspec.model.buffers import is_extra_state, is_unset_buffer
from fastspec.model.targets import Target, find_targets, is_norm, spectral_layers

# what the file spells out by `layers` and `modules_to_save` instead
PATTERNS = ("rank", "target_modules", "exclude_modules", "modules_to_save")
FIELDS = tuple(f.name for f in dataclasses.fields(SpectralConfig) if f.name not in PATTERNS)


def config_of(meta: dict[str, Any], model: nn.Module, folder: Path) -> SpectralConfig:
    """The adapter's config for this model: exactly its layers, at their ranks, and its heads."""
    layers, heads = meta["layers"], meta["modules_to_save"]
    modules = {name for name, _ in model.named_modules()}
    unknown = next((n for n in (*layers, *heads) if n not in modules), None)
    if unknown is not None:
        raise AdapterError(
            f"{folder}: the adapter does not fit this model: it adapts {excerpt(unknown)}, which this "
            "model does not have"
        )
    foreign = next((field for field in meta["spectral"] if field not in FIELDS), None)
    if foreign is not None:
        raise AdapterError(
            f"{folder}: {excerpt(foreign)} is no field of an adapter's config; it has {', '.join(FIELDS)}"
        )
    by_rank: dict[int, list[str]] = {}
    for name, rank in layers.items():
        by_rank.setdefault(rank, []).append(re.escape(name))
    ranks = {rf"\A(?:{'|'.join(names)})\Z": rank for rank, names in by_rank.items()}
    try:
        return SpectralConfig(
            **meta["spectral"],
            rank=next(iter(by_rank)) if len(by_rank) == 1 else ranks,
            target_modules="|".join(map(re.escape, layers)),
            modules_to_save=heads,
        )
    except (ValueError, TypeError) as e:
        raise AdapterError(f"{folder}: not a usable adapter config: {excerpt(e)}") from None


def targets_of(
    model: nn.Module, config: SpectralConfig, folder: Path, bases: bool
) -> tuple[list[Target], tuple[str, ...]]:
    """`find_targets` for the config of a folder, which brings its bases or does not."""
    try:
        return find_targets(model, config, factors_given=bases)
    except (ValueError, TypeError) as e:
        raise AdapterError(
            f"{folder}: the adapter does not fit this model: {excerpt(e, 400)}"
        ) from None


def expected_tensors(
    model: nn.Module, config: SpectralConfig, targets: list[Target], heads: tuple[str, ...]
) -> Expected:
    """What `adapter_tensors` would be if the plain `model` were spectralized by `config`."""
    expected: Expected = {}
    for t in targets:
        shape = delta_shape(config.core, t.directions.rank, config.half_width, config.core_rank)
        expected[f"{t.name}.delta"] = (shape, torch.float32)
        bias: Any = t.module.bias
        if config.train_bias and bias is not None:
            expected[f"{t.name}.bias"] = (bias.shape, bias.dtype)
    if config.train_layernorm:
        for name, module in model.named_modules():
            if is_norm(module):
                for n, p in module.named_parameters(recurse=False):
                    expected[f"{name}.{n}"] = (p.shape, p.dtype)
    for head in heads:
        for n, p in model.get_submodule(head).state_dict().items():
            if not is_extra_state(n):
                expected[f"{head}.{n}"] = (p.shape, p.dtype)
    return expected


def expected_state(
    meta: Mapping[str, Any], model: nn.Module, base: Mapping[str, Tensor], folder: Path
) -> Expected:
    """The tensors of the base that the adapter brings besides, by `Base.tensors` of the model."""
    fixed = {f"{layer}.weight" for layer in meta["layers"]}  # the bases are made from these
    expected: Expected = {}
    for name in meta["state"]:
        if name not in base and is_unset_buffer(model, name):
            expected[name] = None
            continue
        if name not in base or name in fixed:
            raise AdapterError(
                f"{folder}: the adapter does not fit this model: it holds {excerpt(name)}, which this model "
                "does not have or keeps frozen"
            )
        expected[name] = (tuple(base[name].shape), base[name].dtype)
    return expected


def check_same_config(have: SpectralConfig, want: SpectralConfig, folder: Path) -> None:
    # how a model computes or how its targets were spelled does not matter: shapes are compared besides
    fields = (
        *("core", "half_width", "core_rank", "select", "basis", "seed"),
        *("train_bias", "train_layernorm"),
    )
    differing = [f for f in fields if getattr(have, f) != getattr(want, f)]
    if differing:
        details = "; ".join(
            f"{f}: the adapter has {excerpt(getattr(want, f))}, the model {getattr(have, f)!r}"
            for f in differing
        )
        raise AdapterError(f"{folder}: the model was spectralized otherwise: {details}")


def check_same_layers(model: nn.Module, want: Mapping[str, int], folder: Path) -> None:
    have = {name: layer.rank for name, layer in spectral_layers(model)}
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise AdapterError(
                f"{folder}: the model was spectralized otherwise: {name} has rank {want.get(name)} in "
                f"the adapter and {have.get(name)} in the model (None: not adapted)"
            )
