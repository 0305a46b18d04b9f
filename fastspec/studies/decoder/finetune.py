"""One run: finetune by one method at one rate, and the held-out loss afterwards."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastspec
from fastspec.availability import install_advice
from fastspec.model.parameter_groups import parameter_groups
from fastspec.studies import core_maps
from fastspec.studies.decoder.rows import Row

WARMUP = 0.1  # share of the steps


def load(name: str) -> tuple[nn.Module, Any]:
    """A causal language model in float32 and its tokenizer, from a hub name, a folder, or a folder with one
    GGUF file, whose numbers are unpacked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = os.path.isdir(name)
    packed = sorted(Path(name).glob("*.gguf")) if local else []
    options: dict[str, Any] = {"local_files_only": local}
    if packed and not (Path(name) / "config.json").exists():
        options["gguf_file"] = packed[0].name
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(name, **options)


def adapt(model: nn.Module, row: Row, rate: float, seed: int) -> tuple[nn.Module, Any]:
    """The model with the row's numbers trainable, and the groups of its optimiser."""
    if row.method == "spectral":
        config = fastspec.SpectralConfig(
            rank=row.rank,
            core=row.core,
            half_width=row.half_width,
            target_modules=row.target_modules,
            modules_to_save=(),
        )
        fastspec.spectralize(model, config, progress=False)
        if row.core_map is not None:
            torch.manual_seed(seed)
            core_maps.install(model, row.core_map)
        return model, parameter_groups(model, rate)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as e:
        raise ImportError(f"{row.name} needs peft ({e}); {install_advice('peft')}") from e
    assert isinstance(row.rank, int)
    torch.manual_seed(seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=row.rank,
        lora_alpha=2 * row.rank,
        target_modules=row.target_modules,
    )
    model = get_peft_model(model, lora)  # type: ignore[arg-type]
    return model, [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}]


def train(
    model: nn.Module,
    groups: Any,
    batches: Tensor,  # [steps, rows, length]
    announce: Callable[[int, float], None] = lambda step, loss: None,
) -> bool:
    """AdamW without decay; the rate rises over a tenth of the steps and falls linearly to 0.

    Returns:
        Whether all losses were finite; training ends at the first that is not.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = len(batches)
    rising = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / rising, (steps - i) / (steps - rising + 1))
    )
    model.train()
    for step, ids in enumerate(batches, 1):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not math.isfinite(loss.item()):
            return False
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        announce(step, loss.item())
    return True


@torch.inference_mode()
def held_out_loss(model: nn.Module, blocks: Tensor, rows: int = 4) -> float:
    """Mean cross-entropy of the blocks' next tokens, in nats a token."""
    model.eval()
    total = 0.0
    for ids in blocks.split(rows):
        total += len(ids) * model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    return total / len(blocks)
