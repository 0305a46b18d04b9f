"""Adapters as LoRA, for engines that know nothing else: exact, by B = U C and A = Vh of rank k.

A low-rank core has its own rank: B = 2 U A^T and A = (B0 + B) Vh.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from fastspec.files import write_atomically
from fastspec.peft.config import SpectralConfig
from fastspec.peft.layer import SpectralLinear

PREFIX = "base_model.model."


@torch.no_grad()
def convert_to_lora(
    model: nn.Module, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter as a LoRA of its rank, or of its core's, which computes the same up to rounding.

    Unlike `peft.convert_to_lora`, which approximates any method by an SVD per layer, no rank is asked
    for: U C Vh is a product of that form already.

    Args:
        model: a PEFT model, or a transformers model with an adapter.
        adapter_name: which adapter.

    Returns:
        The `LoraConfig`, and the tensors as PEFT stores them: `lora_A.weight` [r, in] and `lora_B.weight`
        [out, r] in float32, and the modules to save as they are.

    Raises:
        ValueError: the model has no such spectral adapter, or it trains biases, which LoRA files of
            other engines have no room for.
    """
    layers = {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, SpectralLinear) and adapter_name in layer.fastspec_delta
    }
    if not layers:
        raise ValueError(f"the model has no spectral adapter named {adapter_name!r}")
    configs: Any = model.peft_config
    config: SpectralConfig = configs[adapter_name]
    if config.bias != "none":
        raise ValueError(f"bias={config.bias!r}: an adapter that trains biases has no LoRA form")
    tensors = {
        PREFIX + key.removeprefix(PREFIX): tensor.detach().cpu().contiguous()
        for key, tensor in get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        ).items()
    }
    for name, layer in layers.items():
        for key in ("fastspec_delta", "fastspec_sketch"):
            tensors.pop(f"{PREFIX}{name}.{key}", None)
        b, a = layer.update_factors(adapter_name)
        # a copy: layers may share a basis, tensors of one file may not
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.to("cpu", torch.float32, copy=True)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.to("cpu", torch.float32)

    ranks = {name: tensors[f"{PREFIX}{name}.lora_B.weight"].shape[1] for name in layers}
    r = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,  # a scale of one
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(layers),
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=not all(isinstance(m.base_layer, nn.Linear) for m in layers.values()),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    ), tensors


def save_as_lora(
    path: str | os.PathLike[str], model: nn.Module, adapter_name: str = "default"
) -> Path:
    """Write `convert_to_lora` as a PEFT adapter folder, which `PeftModel.from_pretrained` and others read.

    Returns:
        The folder.
    """
    config, tensors = convert_to_lora(model, adapter_name)
    folder = Path(path)
    write_atomically(folder / SAFETENSORS_WEIGHTS_NAME, save_tensors(tensors, {"format": "pt"}))
    config.save_pretrained(str(folder))
    return folder
