"""Checkpoints of `transformers.Trainer` and of Accelerate that hold the adapter, not the model.

What a checkpoint lacks, the frozen base, is in the model that resumes; its fingerprint is checked. With
the optimiser, scheduler and random states that both libraries store beside it, a resumed run goes on bit
for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from fastspec.model.adapter import load_adapter, save_adapter
from fastspec.model.convert import adaptation
from fastspec.model.parameter_groups import parameter_groups
from fastspec.model.pretrained import ADAPTERS_KEPT
from fastspec.model.rates import HEAD, coefficients, warn_of_low_rate
from fastspec.model.targets import unwrap

_ADAPTED = "_hf_peft_config_loaded"  # by which transformers knows a model that has PEFT's adapters


class AdapterCheckpoints:
    """Mixin for `Trainer` and its subclasses: `class MyTrainer(AdapterCheckpoints, Seq2SeqTrainer)`.

    `save_model`, the checkpoints, `resume_from_checkpoint` and `load_best_model_at_end` then write and
    read adapter folders (`fastspec.save_adapter`), so every checkpoint also serves `load_adapter`. Beside the
    adapter lie the tokenizer and training_args.bin, as beside a model.

    Where no optimiser is given, one of the kind that the arguments name is made of `parameter_groups`: with
    a rate that suits the core and the weights (`fastspec.default_rate`), or `learning_rate` where the
    arguments have another than their class's default, and 1e-3 for heads. A given optimiser whose rate is
    far too low for coefficients is warned of.

    Attributes:
        save_bases: whether they hold the bases too (`bases` of `save_adapter`).

    Raises:
        ValueError: the model is not a spectralized one, or the arguments ask for DeepSpeed or FSDP,
            whose checkpoints Trainer writes past these methods.
    """

    save_bases = False
    args: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    accelerator: Any
    data_collator: Any
    model: Any
    processing_class: Any
    state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        with _as_adapted(model):
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

    def create_optimizer(self, model: Any = None) -> Any:
        adapted = self._adapted_model()
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, adapted)  # type: ignore[attr-defined]
            if {"params", "model", "optimizer_dict"} & options.keys():
                raise ValueError(
                    f"optim={self.args.optim!r} chooses the parameters itself, which leaves coefficients no "
                    "rate of their own: give an optimiser made of fastspec.parameter_groups(model)"
                )
            del options["lr"]
            usual = {f.name: f.default for f in dataclasses.fields(self.args)}["learning_rate"]
            rate = self.args.learning_rate
            groups = parameter_groups(
                adapted,
                None if rate == usual else rate,
                head_lr=HEAD,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = kind(groups, **options)
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        warn_of_low_rate(unwrap(adapted), optimizer.param_groups)
        return optimizer

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


@contextlib.contextmanager
def _as_adapted(model: Any) -> Iterator[None]:
    """Let Trainer take a model that was loaded quantised: it knows of no adapters but PEFT's."""
    inside = unwrap(model) if isinstance(model, nn.Module) else None
    if inside is None or adaptation(inside) is None or not getattr(inside, "is_quantized", False):
        yield
        return
    mark: dict[str, Any] = inside.__dict__
    mark[_ADAPTED] = True
    try:
        yield
    finally:
        del mark[_ADAPTED]


class SpectralTrainer(AdapterCheckpoints, Trainer):
    """`transformers.Trainer` for a spectralized model; arguments as there.

    `optimizers=(torch.optim.AdamW(fastspec.parameter_groups(model, 3e-2, head_lr=1e-3), fused=True), None)`
    gives it other rates than those that `AdapterCheckpoints` chooses.
    """


class AdapterCallback(TrainerCallback):
    """For any other Trainer: `SFTTrainer(..., callbacks=[fastspec.AdapterCallback()])`.

    Every checkpoint gets the adapter, and so does the output folder when training ends, whatever the Trainer
    writes itself: of a spectralized model the folder that `fastspec.load_adapter` reads, of a PEFT model
    PEFT's own. Coefficients whose rate is far too low are warned of when training begins.

    A plain Trainer's own checkpoint of a spectralized model holds base and coefficients together. It resumes
    there, but `from_pretrained` makes the untrained model of it.

    Raises:
        ValueError: when training begins, if the model has no coefficients that are trained.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = unwrap(kwargs["model"])
        if next(coefficients(model), None) is None:
            raise ValueError(
                "the model has no coefficients to train: call fastspec.spectralize(model, config) before "
                "the Trainer, or give it a model of peft.get_peft_model with fastspec.peft.SpectralConfig"
            )
        warn_of_low_rate(model, kwargs["optimizer"].param_groups)
        model.__dict__[ADAPTERS_KEPT] = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(args, kwargs["model"], f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(args, kwargs["model"], "")
        unwrap(kwargs["model"]).__dict__.pop(ADAPTERS_KEPT, None)

    def _save(self, args: Any, model: Any, below: str) -> None:
        model, folder = unwrap(model), os.path.join(args.output_dir, below)
        if not args.should_save:
            return
        if adaptation(model) is not None:
            save_adapter(model, folder)
        else:
            model.save_pretrained(folder)


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
