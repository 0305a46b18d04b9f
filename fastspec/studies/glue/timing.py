"""Step times of several methods against the frozen floor, measured side by side."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.studies import encoders
from fastspec.studies.glue import data, methods
from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.tasks import TASKS

FLOOR = "frozen floor"


@dataclasses.dataclass(frozen=True)
class StepTime:
    """A training step against the floor's.

    Args:
        milliseconds: median time.
        ratio: median over rounds of its ratio to the floor's time.
        saved: bytes kept for the backward pass (`saved_bytes`), over the floor's.
    """

    milliseconds: float
    ratio: float
    saved: float


class InputShift(nn.Module):
    """Adds a trainable vector to the embeddings, so that dx flows through every layer above.

    A vector, because a LayerNorm over the embeddings takes a shift common to all of them out again.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, embedded: Tensor) -> Tensor:
        return embedded + self.shift


def freeze_to_floor(model: nn.Module, train_pooler: bool = False) -> nn.Module:
    """The least any method that trains below the head can cost: all frozen but head and input."""
    heads = methods.head_modules(model, train_pooler)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(f"{h}.") for h in heads))
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    shift = InputShift(embeddings.weight.shape[-1])
    model.add_module("input_shift", shift)
    embeddings.register_forward_hook(lambda module, args, output: shift(output))
    return model


def step_times(
    configs: Mapping[str, GlueConfig], rounds: int = 8, warmup: int = 2
) -> dict[str, StepTime]:
    """Step times of `configs` (label to configuration) and of the floor, as `FLOOR`.

    One step is forward, backward, gradient clipping and AdamW, as in a run. Every round makes one step
    of each in turn, all on the round's own batch, so that drift of the machine falls on all alike; the
    order rotates. Rows, batch size, length, model and task are those of the first configuration.
    """
    first = next(iter(configs.values()))
    name = encoders.resolve(first.model)
    source = data.load(TASKS[first.task], first.data)
    tokenizer = encoders.load_tokenizer(name)
    texts = source.train.texts[: first.batch_size * (rounds + warmup)]
    labels = (source.train.labels or [])[: len(texts)]
    batches = []
    for start in range(0, len(texts), first.batch_size):
        rows = slice(start, start + first.batch_size)
        batch = tokenizer(
            *map(list, zip(*texts[rows], strict=True)),
            truncation=True,
            max_length=first.max_length,
            padding=True,
            return_tensors="pt",
        )
        batches.append({**batch, "labels": torch.tensor(labels[rows])})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {}
    for label, config in {FLOOR: first, **configs}.items():
        torch.manual_seed(config.seed)
        with encoders.quiet():
            model = encoders.load_classifier(name, source.task)
            heads = methods.head_modules(model, config.train_pooler)
            if label == FLOOR:
                model = freeze_to_floor(model, config.train_pooler)
            else:
                model = methods.apply(model, config)
        groups = methods.optimizer_groups(model, heads, config)
        optimizer = torch.optim.AdamW(groups)
        steps[label] = _Step(model.to(device).train(), optimizer, config.bf16)
    times: dict[str, list[float]] = {label: [] for label in steps}
    for i in range(rounds + warmup):
        batch = {k: v.to(device) for k, v in batches[i % len(batches)].items()}
        order = list(steps)
        shift = i % len(order)
        for label in order[shift:] + order[:shift]:
            elapsed = steps[label](batch)
            if i >= warmup:
                times[label].append(elapsed)
    batch = {k: v.to(device) for k, v in batches[0].items()}
    saved = {label: saved_bytes(step.model, batch) for label, step in steps.items()}
    return {
        label: StepTime(
            statistics.median(values),
            statistics.median(a / b for a, b in zip(values, times[FLOOR], strict=True)),
            saved[label] / saved[FLOOR],
        )
        for label, values in times.items()
    }


def saved_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass, the model's own aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


class _Step:
    """One training step of a model; called with a batch, returns its wall time in ms."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, bf16: bool) -> None:
        self.model, self.optimizer, self.bf16 = model, optimizer, bf16
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, batch: dict[str, Any]) -> float:
        _synchronise()
        began = time.perf_counter()
        device = batch["labels"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        _synchronise()
        return 1e3 * (time.perf_counter() - began)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
