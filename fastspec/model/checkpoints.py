"""Checkpoints of `transformers.Trainer` and of Accelerate that hold the adapter, not the model.

What a checkpoint lacks, the frozen base, is in the model that resumes; its fingerprint is checked. With
the optimiser, scheduler and random states that both libraries store beside it, a resumed run goes on bit
for bit.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from fastspec.model.adapter import load_adapter, save_adapter
from fastspec.model.convert import adaptation


class AdapterCheckpoints:
    """Mixin for `Trainer` and its subclasses: `class MyTrainer(AdapterCheckpoints, Seq2SeqTrainer)`.

    `save_model`, the checkpoints, `resume_from_checkpoint` and `load_best_model_at_end` then write and
    read adapter folders (`fastspec.save_adapter`), so every checkpoint also serves `load_adapter`. Beside the
    adapter lie the tokenizer and training_args.bin, as beside a model.

    Attributes:
        save_bases: whether they hold the bases too (`bases` of `save_adapter`).

    Raises:
        ValueError: the model is not a spectralized one, or the arguments ask for DeepSpeed or FSDP,
            whose checkpoints Trainer writes past these methods.
    """

    save_bases = False
    args: Any
    accelerator: Any
    data_collator: Any
    model: Any
    processing_class: Any
    state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if adaptation(self._adapted_model()) is None:
            raise ValueError(
                "the model has no adapter: call fastspec.spectralize(model, config) before the Trainer"
            )
        for engine in ("deepspeed", "fsdp"):
            if getattr(self, f"is_{engine}_enabled"):
                raise ValueError(
                    f"{type(self).__name__} does not write {engine} checkpoints: use plain DDP, or "
                    "fully_shard in a loop of your own (docs/distributed.md)"
                )

    def _adapted_model(self) -> nn.Module:
        # Trainer keeps a compiled model compiled; the adapter belongs to the module inside
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        save_adapter(self._adapted_model(), folder, bases=self.save_bases)
        # beside it, what Trainer saves beside a model
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self._adapted_model(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter(self._adapted_model(), self.state.best_model_checkpoint)


class SpectralTrainer(AdapterCheckpoints, Trainer):
    """`transformers.Trainer` for a spectralized model; arguments as there.

    Give it the optimiser that suits coefficients and heads:
    `optimizers=(torch.optim.AdamW(fastspec.parameter_groups(model, 3e-2, head_lr=1e-3), fused=True), None)`.
    """


def checkpoint_adapters(accelerator: Any) -> None:
    """Let `accelerator.save_state` and `load_state` write and read adapters in place of models.

    Each prepared model that is spectralized goes to `adapter`, the next to `adapter_1` and so on, in the
    order of `prepare`, below the state's folder; other models are stored as ever.

    Args:
        accelerator: an `accelerate.Accelerator` without DeepSpeed or FSDP.
    """

    def place(models: list[Any], folder: str) -> list[tuple[int, nn.Module, str]]:
        found: list[tuple[int, nn.Module, str]] = []
        for i, wrapped in enumerate(models):
            model = accelerator.unwrap_model(wrapped, keep_torch_compile=False)
            if adaptation(model) is not None:
                name = f"adapter_{len(found)}" if found else "adapter"
                found.append((i, model, os.path.join(folder, name)))
        return found

    def save(models: list[Any], weights: list[dict], folder: str) -> None:
        for i, model, path in reversed(place(models, folder)):
            if accelerator.is_main_process:
                save_adapter(model, path)
            del weights[i]

    def load(models: list[Any], folder: str) -> None:
        for i, model, path in reversed(place(models, folder)):
            load_adapter(model, path)
            del models[i]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
