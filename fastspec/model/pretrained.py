"""`save_pretrained` of a spectralized model of transformers: what a plain Trainer calls."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from fastspec.model.adapter import save_adapter
from fastspec.model.targets import spectral_layers
from fastspec.nn.quantized import QuantizedSpectralLinear

ADAPTERS_KEPT = "_fastspec_adapters_kept"  # on a model whose trainer sees to its adapters


def save_adapter_beside(model: nn.Module, folder: Any) -> None:
    """Write the adapter into a folder that the model's class has just written to, and say what is where.

    The class's file holds base weights and coefficients together, of which `from_pretrained` makes the
    untrained model with no more than a report of unexpected keys. With the adapter beside it the folder has
    everything: `fastspec.load_adapter(Model.from_pretrained(folder), folder)`.
    """
    try:
        save_adapter(model, folder)
    except ValueError as e:
        warnings.warn(
            f"{folder} holds no adapter: {e}. save_pretrained wrote base weights and coefficients, and "
            "from_pretrained takes the base weights alone",
            stacklevel=4,
        )
        return
    if ADAPTERS_KEPT in model.__dict__:
        return
    again = "Model.from_pretrained(folder)"
    merged = ", fastspec.merge_and_unload(model) first stores the adapted model"
    if any(isinstance(layer, QuantizedSpectralLinear) for _, layer in spectral_layers(model)):
        again, merged = f"fastspec.spectralize({again}, config, basis=FILE)", ""
    warnings.warn(
        f"{folder}: save_pretrained writes base weights and coefficients, and from_pretrained takes the base "
        f"weights alone, so the adapter was written beside them: fastspec.load_adapter({again}, folder) is "
        "the trained model. fastspec.SpectralTrainer and fastspec.save_adapter store the adapter alone"
        f"{merged}",
        stacklevel=4,
    )
