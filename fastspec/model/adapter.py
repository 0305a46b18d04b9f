"""Adapter folders: `save_adapter` and `load_adapter`, some KB a task.

The tensors are the coefficients, the heads and whatever else `spectralize` made trainable. The config
holds the `SpectralConfig` and a fingerprint of every other parameter of the model: the base weights, from
which the factors are rebuilt.

A folder may come from anybody. It holds no code and no patterns: the config names its layers and heads
one by one (a regular expression can be made to run for years), names only ever select modules the model
has, and no file is read before its size was compared with what this model can use.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastspec
from fastspec.config import SpectralConfig
from fastspec.cores import delta_shape
from fastspec.files import excerpt
from fastspec.fingerprint import combined_fingerprint, tensor_fingerprint
from fastspec.model.adapter_file import AdapterError, Expected, open_adapter, write_adapter
from fastspec.model.convert import Adaptation, adaptation, spectralize
from fastspec.model.fsdp import FACTORS, assign, is_sharded, reshard, whole
from fastspec.model.targets import find_targets, is_norm, spectral_layers, unwrap
from fastspec.nn.layer import SpectralLayer

# what the file spells out by `layers` and `modules_to_save` instead
PATTERNS = ("rank", "target_modules", "exclude_modules", "modules_to_save")
FIELDS = tuple(f.name for f in dataclasses.fields(SpectralConfig) if f.name not in PATTERNS)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write what `spectralize` made trainable in `model` to `folder`, atomically: one file is replaced.

    A model sharded by FSDP2 is gathered: every process must call this, the first one writes.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not a spectralized one, a value to save is not finite, a parameter is
            trainable that the adapter would not hold, or an adapted weight has changed since the last call.
    """
    model = unwrap(model)
    adapted = adaptation_of(model)
    reshard(model)
    own = adapter_tensors(model)
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and n not in own]
    if left_out:
        raise ValueError(
            f"{left_out[0]} is trainable but no part of the adapter, which could then not be loaded into "
            "its own base: name its module in modules_to_save, or freeze it again; nothing was written"
        )
    tensors = {name: whole(t.detach()).cpu().contiguous() for name, t in own.items()}
    bad = next((name for name, t in tensors.items() if not bool(torch.isfinite(t).all())), None)
    if bad is not None:
        raise ValueError(f"{bad} holds NaN or infinity: nothing was written")
    folder = Path(folder)
    fields = adapted.config.to_dict()
    config = {
        "fastspec_version": fastspec.__version__,
        "base_model": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "base_fingerprint": _base_fingerprint(model, set(tensors), _refuse_other_basis),
        "modules_to_save": list(adapted.modules_to_save),
        "layers": {name: layer.rank for name, layer in spectral_layers(model)},
        "spectral": {name: fields[name] for name in FIELDS},
    }
    sharded = any(map(is_sharded, own.values()))
    if not sharded or torch.distributed.get_rank() == 0:
        write_adapter(folder, tensors, config)
    if sharded:
        torch.distributed.barrier()  # whoever returns may read
    return folder


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put a saved adapter into `model`, in place.

    `model` is the plain base model, which is then spectralized by the adapter's own config, or one that
    was spectralized alike: then the values are copied into the existing tensors. Of a model sharded by
    FSDP2 every process must call this.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no adapter.
        AdapterError: a damaged file, a folder of PEFT, other base weights, another rank or kind of core,
            heads of another size, values that are not finite. The model is unchanged.
    """
    wrapper, model = model, unwrap(model)
    reshard(model)
    config, (tensors,) = read_adapters(model, [folder])
    if next(spectral_layers(model), None) is None:
        spectralize_for(model, config, folder)
    for name, target in adapter_tensors(model).items():
        assign(target, tensors[name])
    return wrapper


def read_adapters(
    model: nn.Module,
    folders: Sequence[str | os.PathLike[str]],
    sizes_free: Callable[[Sequence[str]], Collection[str]] = lambda heads: (),
) -> tuple[SpectralConfig, list[dict[str, Tensor]]]:
    """Read adapter folders and check each against `model`, which is plain or adapted alike.

    Nothing is changed. The base weights are fingerprinted once.

    Args:
        sizes_free: from the names of the heads, the names of the tensors whose first dimension may
            differ from the model's: those of their output layers.

    Returns:
        The config they share (the model's own if it is adapted), and the tensors of every folder.

    Raises:
        FileNotFoundError, AdapterError: as `load_adapter`; also folders of different configs.
    """
    config: SpectralConfig | None = None
    expected: Expected | None = None
    adapted = next(spectral_layers(model), None) is not None
    if adapted:
        config = adaptation_of(model).config
        expected = {n: (t.shape, t.dtype) for n, t in adapter_tensors(model).items()}
    limit = 8 * sum(p.numel() for p in model.parameters())  # a core is no larger than its matrix
    free: Collection[str] = ()
    fingerprint = None
    told: dict[str, Any] = {}
    found = []
    for folder in map(Path, folders):
        with open_adapter(folder) as file:
            meta = file.meta
            saying = {key: meta[key] for key in ("spectral", "layers", "modules_to_save")}
            if saying != told:  # of a thousand folders nearly all say the same
                own = _config_of(meta, model, folder)
                config = config or own
                expected = expected or _expected(model, own, folder)
                _check_same_config(config, own, folder)
                if adapted:
                    _check_same_layers(model, meta["layers"], folder)
                free, told = sizes_free(meta["modules_to_save"]), saying
            assert config is not None
            assert expected is not None
            tensors = file.tensors(expected, limit, free)
        fingerprint = fingerprint or _base_fingerprint(model, set(tensors), _remake_basis)
        if fingerprint != meta["base_fingerprint"]:
            made_from = f" ({excerpt(meta['base_model'])})" if meta["base_model"] else ""
            raise AdapterError(
                f"{folder}: the adapter was made from other base weights{made_from}; coefficients only "
                "mean something in the basis of their own model: load that one, in the same dtype"
            )
        found.append(tensors)
    assert config is not None, "read_adapters needs at least one folder"
    return config, found


def spectralize_for(
    model: nn.Module, config: SpectralConfig, folder: str | os.PathLike[str]
) -> None:
    """Adapt a plain model by the config of `read_adapters`; an AdapterError names the folder."""
    try:
        spectralize(model, config)
    except (ValueError, TypeError) as e:
        raise AdapterError(
            f"{folder}: the adapter does not fit this model: {excerpt(e, 400)}"
        ) from None


def adaptation_of(model: nn.Module) -> Adaptation:
    found = adaptation(model)
    if found is None:
        raise ValueError("the model has no adapter: call fastspec.spectralize(model, config) first")
    return found


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name to tensor (the model's own) of everything an adapter holds."""
    adapted = adaptation_of(model)
    config = adapted.config
    tensors: dict[str, Tensor] = {}
    for name, layer in spectral_layers(model):
        tensors[f"{name}.delta"] = layer.delta
        if config.train_bias and layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    if config.train_layernorm:
        for name, module in model.named_modules():
            if is_norm(module):
                tensors |= {f"{name}.{n}": p for n, p in module.named_parameters(recurse=False)}
    for head in adapted.modules_to_save:
        state = model.get_submodule(head).state_dict(keep_vars=True)
        tensors |= {f"{head}.{n}": t for n, t in state.items()}
    return tensors


def _config_of(meta: dict[str, Any], model: nn.Module, folder: Path) -> SpectralConfig:
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


def _expected(model: nn.Module, config: SpectralConfig, folder: Path) -> Expected:
    """What `adapter_tensors` would be if the plain `model` were spectralized by `config`."""
    try:
        targets, heads = find_targets(model, config)
    except (ValueError, TypeError) as e:
        raise AdapterError(
            f"{folder}: the adapter does not fit this model: {excerpt(e, 400)}"
        ) from None
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for t in targets:
        shape = delta_shape(config.core, t.directions.rank, config.half_width)
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
            expected[f"{head}.{n}"] = (p.shape, p.dtype)
    return expected


def _base_fingerprint(
    model: nn.Module, trained: set[str], on_other_basis: Callable[[str, SpectralLayer], None]
) -> str:
    """Fingerprint of every parameter the adapter does not hold, as the unmerged model has it.

    `on_other_basis` is called with every layer whose factors were made from another weight than it has.
    """
    state: dict[str, Tensor] = {}
    factors = {f"{layer}.{f}" for layer, _ in spectral_layers(model) for f in FACTORS}
    for name, p in model.named_parameters():
        if name.endswith(".base_weight"):
            state[name.removesuffix(".base_weight") + ".weight"] = p
        elif name not in trained and name not in factors and not name.endswith(".delta"):
            state.setdefault(name, p)
    prints = {name: tensor_fingerprint(whole(p)) for name, p in state.items()}
    cast = []
    for name, layer in spectral_layers(model):
        own = prints.get(f"{name}.weight")  # of a shared weight, one layer's alone
        match = True if own is None else layer.basis_of(own)
        if match is None:
            cast.append(name)
        elif not match:
            on_other_basis(name, layer)
    if cast:
        warnings.warn(
            f"the model was cast after its factors were made ({cast[0]} and {len(cast) - 1} more). A plain "
            "model makes them from the cast weights, so that an adapter carried from one to the other acts "
            "in a basis some percent off (bfloat16): cast a model before spectralize()",
            stacklevel=3,
        )
    return combined_fingerprint(prints)


def _refuse_other_basis(name: str, layer: SpectralLayer) -> None:
    raise ValueError(
        f"{name}.weight has changed since its factors were made, past the count of its writes (as by "
        "weight.data) or since the last call: put it back, or call the layer's refactorize(), which gives "
        "the coefficients another basis; nothing was written"
    )


def _remake_basis(name: str, layer: SpectralLayer) -> None:
    layer.refactorize()


def _check_same_config(have: SpectralConfig, want: SpectralConfig, folder: Path) -> None:
    # how a model computes or how its targets were spelled does not matter: shapes are compared besides
    fields = ("core", "half_width", "select", "basis", "seed", "train_bias", "train_layernorm")
    differing = [f for f in fields if getattr(have, f) != getattr(want, f)]
    if differing:
        details = "; ".join(
            f"{f}: the adapter has {excerpt(getattr(want, f))}, the model {getattr(have, f)!r}"
            for f in differing
        )
        raise AdapterError(f"{folder}: the model was spectralized otherwise: {details}")


def _check_same_layers(model: nn.Module, want: Mapping[str, int], folder: Path) -> None:
    have = {name: layer.rank for name, layer in spectral_layers(model)}
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise AdapterError(
                f"{folder}: the model was spectralized otherwise: {name} has rank {want.get(name)} in "
                f"the adapter and {have.get(name)} in the model (None: not adapted)"
            )
