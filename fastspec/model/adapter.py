"""Adapter folders: `adapter.safetensors` and `adapter_config.json`, some KB a task.

The tensors are the coefficients, the heads and whatever else `spectralize` made trainable. The config
holds the `SpectralConfig`, a fingerprint of every other parameter of the model (the base weights, from
which the factors are rebuilt), and the digest of the tensor file, so that two halves of different saves
are not taken for one adapter.

A folder may come from anybody. It holds no code and no patterns: the config names its layers and heads
one by one (a regular expression can be made to run for years), names only ever select modules the model
has, and no file is read before its size was compared with what this model can use.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

import fastspec
from fastspec.config import SpectralConfig
from fastspec.cores import delta_shape
from fastspec.files import write_atomically, write_json
from fastspec.fingerprint import combined_fingerprint, tensor_fingerprint
from fastspec.model.convert import Adaptation, adaptation, spectralize
from fastspec.model.fsdp import FACTORS, assign, is_sharded, reshard, whole
from fastspec.model.targets import find_targets, is_norm, spectral_layers, unwrap

TENSOR_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT = 2
# what the file spells out by `layers` and `modules_to_save` instead
PATTERNS = ("rank", "target_modules", "exclude_modules", "modules_to_save")
MAX_CONFIG_BYTES = 4 << 20  # 10,000 layers take one
MAX_HEADER_BYTES = 16 << 20  # of the tensor file, and what it may exceed the expected size by

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name


class AdapterError(ValueError):
    """An adapter folder can't be used with this model; the message says why. The model is unchanged."""


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write what `spectralize` made trainable in `model` to `folder`, atomically.

    A model sharded by FSDP2 is gathered: every process must call this, the first one writes.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not a spectralized one, a value to save is not finite, or a parameter is
            trainable that the adapter would not hold.
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
    data = save_tensors(tensors)
    folder = Path(folder)
    config = {
        "format": FORMAT,
        "fastspec_version": fastspec.__version__,
        "base_model": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "base_fingerprint": _base_fingerprint(model, set(tensors)),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "modules_to_save": list(adapted.modules_to_save),
        "layers": {name: layer.rank for name, layer in spectral_layers(model)},
        "spectral": {k: v for k, v in adapted.config.to_dict().items() if k not in PATTERNS},
    }
    sharded = any(map(is_sharded, own.values()))
    if not sharded or torch.distributed.get_rank() == 0:
        write_atomically(folder / TENSOR_FILE, data)
        write_json(folder / CONFIG_FILE, config)
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
        FileNotFoundError: the folder or one of its files is missing.
        AdapterError: damaged files, other base weights, another rank or kind of core, heads of another
            size, values that are not finite. The model is unchanged.
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
        meta = _read_config(folder / CONFIG_FILE)
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
        path = folder / TENSOR_FILE
        tensors = _read_tensors(path, meta["tensors_sha256"], expected, limit, free)
        fingerprint = fingerprint or _base_fingerprint(model, set(tensors))
        if fingerprint != meta["base_fingerprint"]:
            made_from = f" ({meta['base_model']})" if meta["base_model"] else ""
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
        raise AdapterError(f"{folder}: the adapter does not fit this model: {e}") from None


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
            f"{folder}: the adapter does not fit this model: it adapts {unknown!r}, which this model "
            "does not have"
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
        raise AdapterError(f"{folder / CONFIG_FILE}: not a usable adapter config: {e}") from None


def _expected(model: nn.Module, config: SpectralConfig, folder: Path) -> Expected:
    """What `adapter_tensors` would be if the plain `model` were spectralized by `config`."""
    try:
        targets, heads = find_targets(model, config)
    except (ValueError, TypeError) as e:
        raise AdapterError(f"{folder}: the adapter does not fit this model: {e}") from None
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


def _base_fingerprint(model: nn.Module, trained: set[str]) -> str:
    """Fingerprint of every parameter the adapter does not hold, as the unmerged model has it."""
    state: dict[str, Tensor] = {}
    factors = {f"{layer}.{f}" for layer, _ in spectral_layers(model) for f in FACTORS}
    for name, p in model.named_parameters():
        if name.endswith(".base_weight"):
            state[name.removesuffix(".base_weight") + ".weight"] = p
        elif name not in trained and name not in factors and not name.endswith(".delta"):
            state.setdefault(name, p)
    return combined_fingerprint({name: tensor_fingerprint(whole(p)) for name, p in state.items()})


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file that is no larger than `limit` bytes; of a larger one nothing is read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{path}: not a regular file; expected one of an adapter folder")
        if status.st_size > limit:
            raise AdapterError(
                f"{path}: {status.st_size:,} bytes, where an adapter for this model has at most "
                f"{limit:,}: damaged, of another rank or with a head of another size"
            )
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file; expected an adapter folder") from None
    except OSError as e:
        raise AdapterError(f"{path}: can't be read: {e}") from None


def _read_config(path: Path) -> dict[str, Any]:
    """The fields of an adapter config, their types checked; "spectral" is still to be."""
    data = read_bounded(path, MAX_CONFIG_BYTES)
    try:
        meta = json.loads(data)
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']!r}; this version reads format {FORMAT}")
        for key, kind in (
            ("base_fingerprint", str),
            ("tensors_sha256", str),
            ("modules_to_save", list),
            ("layers", dict),
            ("spectral", dict),
        ):
            if not isinstance(meta[key], kind):
                raise TypeError(f"{key!r} is not a {kind.__name__}")
        if not all(isinstance(name, str) and name for name in meta["modules_to_save"]):
            raise TypeError("'modules_to_save' must list module names")
        if not meta["layers"] or not all(type(k) is int and k > 0 for k in meta["layers"].values()):
            raise TypeError("'layers' must map module names to ranks of at least 1")
        base_model = meta.get("base_model")
        return meta | {"base_model": base_model if isinstance(base_model, str) else None}
    except KeyError as e:
        raise AdapterError(f"{path}: the key {e} is missing: not an adapter config") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise AdapterError(f"{path}: not a usable adapter config: {e}") from None


def _read_tensors(
    path: Path, digest: str, expected: Expected, limit: int, sizes_free: Collection[str]
) -> dict[str, Tensor]:
    """The tensors `expected`, and nothing else; at most `limit` bytes of them are read."""
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())
    data = read_bounded(path, min(size, limit) + MAX_HEADER_BYTES)
    if hashlib.sha256(data).hexdigest() != digest:
        raise AdapterError(
            f"{path}: the file is truncated, damaged or of another save than {CONFIG_FILE} beside it"
        )
    try:
        tensors = load_tensors(data)
    except Exception as e:  # what it raises depends on which of its assumptions the file breaks
        raise AdapterError(f"{path}: not a usable safetensors file: {e!r}") from None
    check_tensors(tensors, expected, path.parent, sizes_free)
    return tensors


def _check_same_config(have: SpectralConfig, want: SpectralConfig, folder: Path) -> None:
    # how a model computes or how its targets were spelled does not matter: shapes are compared besides
    fields = ("core", "half_width", "select", "basis", "seed", "train_bias", "train_layernorm")
    differing = [f for f in fields if getattr(have, f) != getattr(want, f)]
    if differing:
        details = "; ".join(
            f"{f}: the adapter has {getattr(want, f)!r}, the model {getattr(have, f)!r}"
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


def check_tensors(
    tensors: dict[str, Tensor], expected: Expected, folder: Path, sizes_free: Collection[str]
) -> None:
    for name, (shape, dtype) in expected.items():
        if name not in tensors:
            raise AdapterError(f"{folder}: the adapter lacks {name}, which this model expects")
        have: tuple[int, ...] = tensors[name].shape
        if name in sizes_free and len(have) == len(shape) and have[0] > 0:
            have = (shape[0], *have[1:])
        if have != shape:
            raise AdapterError(
                f"{folder}: {name} is {list(tensors[name].shape)} in the adapter, but this model "
                f"expects {list(shape)}: another rank, or a head of another size"
            )
        if tensors[name].dtype != dtype:
            raise AdapterError(
                f"{folder}: {name} is {tensors[name].dtype} in the adapter, but this model expects "
                f"{dtype}: cast the model before loading"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise AdapterError(f"{folder}: {name} holds NaN or infinity")
    extra = tensors.keys() - expected.keys()
    if extra:
        raise AdapterError(
            f"{folder}: the adapter holds {min(extra)}, which this model does not have"
        )
