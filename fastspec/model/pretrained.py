"""`save_pretrained` of a spectralized model of transformers: what a plain Trainer calls."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from fastspec.model.adapter import save_adapter
from fastspec.model.convert import adaptation
from fastspec.model.targets import spectral_layers


def save_adapter_too(model: nn.Module) -> None:
    """Let the model's `save_pretrained` write the adapter beside what it writes.

    Its own file holds base weights and coefficients together, of which `from_pretrained` makes the untrained
    model with no more than a report of unexpected keys. With the adapter beside it the folder has everything:
    `fastspec.load_adapter(Model.from_pretrained(folder), folder)`.
    """
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = functools.partial(_save_pretrained, model)  # type: ignore[assignment]


def _save_pretrained(model: Any, save_directory: Any, *args: Any, **options: Any) -> Any:
    result = type(model).save_pretrained(model, save_directory, *args, **options)
    layers = [layer for _, layer in spectral_layers(model)]
    # a merged model's file reloads as the trained one; a plain one's, that was spectralized once, too
    if adaptation(model) is None or not layers or any(layer.merged for layer in layers):
        return result
    if not options.get("is_main_process", True):
        return result
    try:
        save_adapter(model, save_directory)
    except ValueError as e:
        warnings.warn(f"{save_directory} holds no adapter: {e}", stacklevel=2)
        return result
    warnings.warn(
        f"{save_directory}: the model's own file reloads as the untrained model; the trained one is "
        "fastspec.load_adapter(Model.from_pretrained(folder), folder), from the adapter that was written "
        "beside it. fastspec.SpectralTrainer and fastspec.save_adapter write the adapter alone, some KB",
        stacklevel=2,
    )
    return result
