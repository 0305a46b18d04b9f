"""The models and the candidates of the whole-step benchmarks: fastspec, its peers and the frozen floor."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable

import torch
from torch import nn

import fastspec
from fastspec.model.targets import spectral_layers
from fastspec.studies.encoders import default_model, quiet
from fastspec.studies.glue.timing import freeze_to_floor


@dataclasses.dataclass(frozen=True)
class Workload:
    """One model and batch: `batch` sequences of `length` tokens."""

    model: str
    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.model}-{self.batch}x{self.length}"


def build(name: str) -> nn.Module:
    """A classifier on pretrained MiniLM weights, or on random ones in the shape of BERT-base.

    Random weights are given the slowly falling spectrum of trained ones, (1 + i/30)^-0.7, by scaling the
    columns of their QR factors: times do not depend on values, but the factorisation's do.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForSequenceClassification, BertConfig
    from transformers import BertForSequenceClassification as Bert

    torch.manual_seed(0)
    if name == "minilm":
        with quiet():  # the head is new, as it says at length
            return AutoModelForSequenceClassification.from_pretrained(default_model())
    model = Bert(BertConfig())
    for module in model.bert.encoder.modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.copy_(decaying(*module.weight.shape))
    return model


def decaying(
    rows: int, cols: int, seed: int = 0, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """A random matrix [rows, cols] with singular values (1 + i/30)^-0.7, scaled to a norm of 1."""
    g = torch.Generator(device).manual_seed(seed)
    short = min(rows, cols)
    u = torch.linalg.qr(torch.randn(rows, short, generator=g, device=device))[0]
    v = torch.linalg.qr(torch.randn(cols, short, generator=g, device=device))[0]
    return (u * (1 + torch.arange(short, device=device) / 30) ** -0.7) @ v.mT


Prepare = Callable[[nn.Module], nn.Module]


def spectral(rank: int | str, core: str = "diag", path: str = "fast") -> Prepare:
    def prepare(model: nn.Module) -> nn.Module:
        config = fastspec.SpectralConfig(rank=rank, core=core, path=path)
        fastspec.spectralize(model, config, progress=False)
        with torch.no_grad():
            for _, layer in spectral_layers(model):
                layer.delta.normal_(std=1e-3)  # away from zero, where the merge is skipped
        return model

    return prepare


def compiled_reference(model: nn.Module) -> nn.Module:
    return torch.compile(spectral(32, path="reference")(model))


def eigentune(model: nn.Module) -> nn.Module:
    from eigentune import EigenTuneConfig, get_eigentune_model

    config = EigenTuneConfig(rank=32, target_modules=["query", "key", "value", "dense"])
    head = list(model.classifier.parameters())
    model = get_eigentune_model(model, config)
    for p in head:
        p.requires_grad_(True)
    return model


def peft_lora(init: bool | str, rank: int = 8) -> Prepare:
    def prepare(model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=rank,
            target_modules=["query", "key", "value", "dense"],
            task_type="SEQ_CLS",
            init_lora_weights=init,
        )
        return get_peft_model(model, config)

    return prepare


def full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


PEERS: dict[str, Prepare] = {
    "eigentune 0.2 k=32": eigentune,
    "PEFT LoRA r8": peft_lora(True),
    "PEFT PiSSA r8": peft_lora("pissa_niter_4"),
    "full finetuning": full,
    "torch.compile(reference)": compiled_reference,
}


class Step:
    """A whole training step of one prepared copy of a model: forward, backward, optimiser, reset."""

    def __init__(self, base: nn.Module, prepare: Prepare, load: Workload) -> None:
        self.model = prepare(copy.deepcopy(base)).train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # it would add the same to every candidate and hide the differences
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        g = torch.Generator().manual_seed(0)
        self.batch = {
            "input_ids": torch.randint(1000, 30000, (load.batch, load.length), generator=g),
            "attention_mask": torch.ones(load.batch, load.length, dtype=torch.long),
            "labels": torch.randint(0, 2, (load.batch,), generator=g),
        }

    def loss(self) -> torch.Tensor:
        return self.model(**self.batch).loss

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def floor(base: nn.Module, load: Workload) -> Step:
    """The frozen model: dx flows through every frozen linear; head and optimiser as elsewhere."""
    return Step(base, freeze_to_floor, load)
