"""Adapter folders: `adapter.safetensors` and `adapter_config.json`, some KB a task.

The tensors are the coefficients, the heads and whatever else `spectralize` made trainable. The config
holds the `SpectralConfig`, a fingerprint of every other parameter of the model (the base weights, from
which the factors are rebuilt), and the digest of the tensor file, so that two halves of different saves
are not taken for one adapter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

import fastspec
from fastspec.config import SpectralConfig
from fastspec.convert import Adaptation, adaptation, spectralize
from fastspec.files import write_atomically, write_json
from fastspec.fingerprint import combined_fingerprint, tensor_fingerprint
from fastspec.functional import delta_shape
from fastspec.targets import find_targets, is_norm, spectral_layers

TENSOR_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT = 1


class AdapterError(ValueError):
    """An adapter folder can't be used with this model; the message says why. The model is unchanged."""


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write what `spectralize` made trainable in `model` to `folder`, atomically.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not a spectralized one, or a value to save is not finite.
    """
    adapted = _adaptation_of(model)
    tensors = {name: t.detach().cpu().contiguous() for name, t in _adapter_tensors(model).items()}
    bad = next((name for name, t in tensors.items() if not bool(torch.isfinite(t).all())), None)
    if bad is not None:
        raise ValueError(f"{bad} holds NaN or infinity: nothing was written")
    data = save_tensors(tensors)
    folder = Path(folder)
    write_atomically(folder / TENSOR_FILE, data)
    write_json(
        folder / CONFIG_FILE,
        {
            "format": FORMAT,
            "fastspec_version": fastspec.__version__,
            "base_model": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
            "base_fingerprint": _base_fingerprint(model, set(tensors)),
            "tensors_sha256": hashlib.sha256(data).hexdigest(),
            "modules_to_save": list(adapted.modules_to_save),
            "spectral": adapted.config.to_dict(),
        },
    )
    return folder


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Put a saved adapter into `model`, in place.

    `model` is the plain base model, which is then spectralized by the adapter's own config, or one that
    was spectralized alike: then the values are copied into the existing tensors.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        AdapterError: damaged files, other base weights, another rank or kind of core, heads of another
            size, values that are not finite. The model is unchanged.
    """
    folder = Path(folder)
    meta = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / TENSOR_FILE, meta["tensors_sha256"])
    config: SpectralConfig = meta["spectral"]
    adapted = next(spectral_layers(model), None) is not None
    if adapted:
        _check_same_config(_adaptation_of(model).config, config, folder)
        expected = {name: t.shape for name, t in _adapter_tensors(model).items()}
    else:
        expected = _expected_shapes(model, config, meta["modules_to_save"], folder)
    _check_shapes(tensors, expected, folder)
    if _base_fingerprint(model, set(tensors)) != meta["base_fingerprint"]:
        made_from = f" ({meta['base_model']})" if meta["base_model"] else ""
        raise AdapterError(
            f"{folder}: the adapter was made from other base weights{made_from}; coefficients only "
            "mean something in the basis of their own model: load that one, in the same dtype"
        )
    if not adapted:
        # the heads as they were found at saving time, whatever this model's own would be
        spectralize(model, dataclasses.replace(config, modules_to_save=meta["modules_to_save"]))
        model.spectral = Adaptation(config, tuple(meta["modules_to_save"]))  # type: ignore[assignment]
    targets = _adapter_tensors(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
    return model


def _adaptation_of(model: nn.Module) -> Adaptation:
    found = adaptation(model)
    if found is None:
        raise ValueError("the model has no adapter: call fastspec.spectralize(model, config) first")
    return found


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name to tensor (the model's own) of everything an adapter holds."""
    adapted = _adaptation_of(model)
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


def _expected_shapes(
    model: nn.Module, config: SpectralConfig, modules_to_save: list[str], folder: Path
) -> dict[str, torch.Size]:
    """The shapes `_adapter_tensors` would have if the plain `model` were spectralized by `config`."""
    try:
        targets, heads = find_targets(
            model, dataclasses.replace(config, modules_to_save=modules_to_save)
        )
    except (ValueError, TypeError) as e:
        raise AdapterError(f"{folder}: the adapter does not fit this model: {e}") from None
    shapes: dict[str, torch.Size] = {}
    for t in targets:
        shape = delta_shape(config.core, t.directions.rank, config.half_width)
        shapes[f"{t.name}.delta"] = torch.Size(shape)
        bias: Any = t.module.bias
        if config.train_bias and bias is not None:
            shapes[f"{t.name}.bias"] = bias.shape
    if config.train_layernorm:
        for name, module in model.named_modules():
            if is_norm(module):
                shapes |= {
                    f"{name}.{n}": p.shape for n, p in module.named_parameters(recurse=False)
                }
    for head in heads:
        state = model.get_submodule(head).state_dict()
        shapes |= {f"{head}.{n}": t.shape for n, t in state.items()}
    return shapes


def _base_fingerprint(model: nn.Module, trained: set[str]) -> str:
    """Fingerprint of every parameter the adapter does not hold, as the unmerged model has it."""
    state: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if name.endswith(".base_weight"):
            state[name.removesuffix(".base_weight") + ".weight"] = p
        elif name not in trained and not name.endswith(".delta"):
            state.setdefault(name, p)
    return combined_fingerprint({name: tensor_fingerprint(p) for name, p in state.items()})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text())
        for key, kind in (
            ("base_fingerprint", str),
            ("tensors_sha256", str),
            ("modules_to_save", list),
            ("spectral", dict),
        ):
            if not isinstance(meta[key], kind):
                raise TypeError(f"{key!r} is not a {kind.__name__}")
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']!r}; this version reads format {FORMAT}")
        return meta | {
            "spectral": SpectralConfig(**meta["spectral"]),
            "base_model": meta.get("base_model"),
        }
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected an adapter folder") from None
    except KeyError as e:
        raise AdapterError(f"{path}: the key {e} is missing: not an adapter config") from None
    except (ValueError, TypeError) as e:
        raise AdapterError(f"{path}: not a usable adapter config: {e}") from None


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected an adapter folder") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise AdapterError(
            f"{path}: the file is truncated, damaged or of another save than {CONFIG_FILE} beside it"
        )
    try:
        tensors = load_tensors(data)
    except SafetensorError as e:
        raise AdapterError(f"{path}: not a safetensors file: {e}") from None
    for name, t in tensors.items():
        if not bool(torch.isfinite(t).all()):
            raise AdapterError(f"{path}: {name} holds NaN or infinity")
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


def _check_shapes(
    tensors: dict[str, Tensor], expected: dict[str, torch.Size], folder: Path
) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            raise AdapterError(f"{folder}: the adapter lacks {name}, which this model expects")
        if tensors[name].shape != shape:
            raise AdapterError(
                f"{folder}: {name} is {list(tensors[name].shape)} in the adapter, but this model "
                f"expects {list(shape)}: another rank, or a head of another size"
            )
    extra = tensors.keys() - expected.keys()
    if extra:
        raise AdapterError(
            f"{folder}: the adapter holds {min(extra)}, which this model does not have"
        )
