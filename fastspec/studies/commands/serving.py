"""`fastspec serve-bench`: what many tasks cost on a model of the user's own, on the user's own machine."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastspec
from fastspec.cores import CORES
from fastspec.files import write_json
from fastspec.multitask.bank import TaskBank


@dataclasses.dataclass(frozen=True)
class Report:
    """Measured: forwards over the unadapted model's (medians of interleaved rounds), times and memory."""

    tasks: int
    batch: int
    length: int
    threads: int
    unadapted_ms: float
    noise: float  # the unadapted model against itself, off 1
    ratios: dict[str, float]
    switch_ms: float
    coefficient_bytes: int
    head_bytes: int
    basis_bytes: int

    def __str__(self) -> str:
        lines = [
            f"{self.tasks:,} tasks, {self.batch} x {self.length} tokens, {self.threads} threads",
            f"  {'forward of the unadapted model':34}{self.unadapted_ms:8.1f} ms   "
            f"(against itself: {100 * self.noise:.1f} % off)",
        ]
        lines += [f"  {name:34}{ratio:8.3f} x" for name, ratio in self.ratios.items()]
        lines += [
            f"  {'switching the active task':34}{self.switch_ms:8.2f} ms",
            f"  {'coefficients of all tasks':34}{self.coefficient_bytes / 1e6:8.1f} MB",
            f"  {'heads of all tasks':34}{self.head_bytes / 1e6:8.1f} MB",
            f"  {'the basis they share':34}{self.basis_bytes / 1e6:8.1f} MB",
        ]
        return "\n".join(lines)


def fill(bank: TaskBank, count: int, seed: int = 0) -> list[str]:
    """Tasks "0", "1", ... of random values, small beside the pretrained ones; returns their names."""
    g = torch.Generator().manual_seed(seed)

    def values() -> dict[str, Tensor]:
        return {
            slot.name: slot.pretrained.cpu()
            + 1e-3 * torch.randn(slot.pretrained.shape, generator=g)
            for slot in bank.slots
            if slot.pretrained.is_floating_point()
        }

    names = [str(i) for i in range(count)]
    bank.add({name: values() for name in names})
    return names


def interleaved(
    floor: Callable[[], object], candidates: Mapping[str, Callable[[], object]], rounds: int
) -> tuple[float, float, dict[str, float]]:
    """Median ms of `floor`, how far it is from itself, and median ratios of `candidates` to it.

    Each round runs all in turn, each between two runs of the floor, so that drift falls on all alike.
    """
    steps = {"": floor, **candidates}
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    floors = []
    for step in steps.values():
        step()
    before = _seconds(floor)
    for _ in range(rounds):
        for name, step in steps.items():
            own, after = _seconds(step), _seconds(floor)
            ratios[name].append(2 * own / (before + after))
            floors.append(after)
            before = after
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return 1e3 * statistics.median(floors), abs(medians.pop("") - 1), medians


def switch_ms(model: nn.Module, names: list[str], rounds: int = 100) -> float:
    """Median ms of `set_task` from one task to the next."""
    times = [
        _seconds(lambda i=i: fastspec.set_task(model, names[i % len(names)]))  # type: ignore[misc]
        for i in range(1, rounds + 1)
    ]
    fastspec.set_task(model, None)
    return 1e3 * statistics.median(times)


def table_bytes(bank: TaskBank) -> tuple[int, int, int]:
    """Bytes of the coefficients of all tasks, of their heads, and of the basis they share."""
    coefficients = heads = basis = 0
    for slot in bank.slots:
        if slot.leaf == "delta":
            coefficients += slot.table.nbytes
            basis += sum(getattr(slot.owner, name).nbytes for name in ("u", "s", "vh"))
        else:
            heads += slot.table.nbytes
    return coefficients, heads, basis


def measure(
    base: nn.Module, model: nn.Module, batch: Mapping[str, Tensor], count: int, rounds: int
) -> Report:
    """Serve `count` tasks from `model` (spectralized, without tasks), against the plain model `base`."""
    bank = fastspec.task_bank(model, count)
    names = fill(bank, count)
    rows, length = batch["input_ids"].shape
    mixed = [names[i * len(names) // rows % len(names)] for i in range(rows)]
    one = [names[0]] * rows
    fastspec.set_task(model, names[-1])
    with torch.inference_mode():
        ms, noise, ratios = interleaved(
            lambda: base(**batch),
            {
                "every row its own task": lambda: model(**batch, tasks=mixed),
                "every row the same task": lambda: model(**batch, tasks=one),
                "the active task alone": lambda: model(**batch),
            },
            rounds,
        )
    memory = table_bytes(bank)
    switching = switch_ms(model, names[:100])
    threads = torch.get_num_threads()
    return Report(count, rows, length, threads, ms, noise, ratios, switching, *memory)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub name of a model that can classify sequences")
    parser.add_argument("--tasks", type=int, default=1024, help="how many (default 1024)")
    parser.add_argument("--rank", type=int, default=32, help="directions a layer (default 32)")
    parser.add_argument("--core", choices=CORES, default="diag", help="default diag")
    parser.add_argument("--batch", type=int, default=32, help="rows of the batch (default 32)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (default 64)")
    parser.add_argument("--basis", metavar="FILE", help="of `fastspec factorize`, to save its time")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def main(args: argparse.Namespace) -> int:
    for name in ("tasks", "batch", "length", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    from transformers import AutoModelForSequenceClassification

    from fastspec.studies.encoders import go_offline_if, quiet, resolve

    name = resolve(args.model)
    go_offline_if(os.path.isdir(name))
    with quiet():
        loaded = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=getattr(torch, args.dtype)
        )
    base: Any = loaded.to(args.device).eval()
    if base.config.pad_token_id is None:
        base.config.pad_token_id = 0  # decoders look for the last token that is no padding
    model = copy.deepcopy(base)
    config = fastspec.SpectralConfig(rank=args.rank, core=args.core)
    fastspec.spectralize(model, config, basis=args.basis)
    g = torch.Generator().manual_seed(0)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(1, vocabulary, (args.batch, args.length), generator=g).to(args.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    report = measure(base, model, batch, args.tasks, args.rounds)
    print(f"{args.model}, rank {args.rank}, {args.core} core, {args.dtype}")
    print(report)
    if args.json:
        write_json(args.json, dataclasses.asdict(report))
    return 0


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
