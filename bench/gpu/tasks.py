"""1,024 tasks in one batch against the unadapted model and one task; PEFT's batch of 32 adapters beside."""

from __future__ import annotations

import copy
import sys
from typing import Any

import harness
import torch
from support import TOLERANCE, relative_error
from torch import nn

import fastspec
from fastspec.studies.commands.serving import fill
from gpu import device, networks
from gpu.device import DEVICE, pick
from gpu.networks import BASE, MINILM, Workload
from gpu.record import Record

TASKS = pick(1024, 8)
ADAPTERS = pick(32, 2)
ROUNDS = pick(15, 2)
# batches of rows, each row a task of its own
BATCHES: list[tuple[Workload, int, int]] = pick(
    [(MINILM, 32, 64), (BASE, 32, 64), (MINILM, 1024, 64)], [(MINILM, 2, 8)]
)
ALL, ONE, PEFT = "every row its own task", "one task", "PEFT LoRA r8"


def batch_of(rows: int, length: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 100, (rows, length), generator=g).to(DEVICE)


def check(base: nn.Module, model: nn.Module, ids: torch.Tensor, index: torch.Tensor) -> None:
    """Rows as their tasks alone, and a row of none as the base model."""
    index = index.clone()
    index[0] = -1
    mixed = model(input_ids=ids, tasks=index).logits
    limit = TOLERANCE[networks.BF16]
    error = relative_error(mixed[:1], base(input_ids=ids[:1]).logits)
    if not error <= limit:
        raise AssertionError(f"a row without a task is off by {error:.1e}")
    last = model(input_ids=ids[-1:], tasks=index[-1:]).logits
    error = relative_error(mixed[-1:], last)
    if not error <= limit:
        raise AssertionError(f"a row of a mixed batch is off by {error:.1e}")


def many_adapters(base: nn.Module, load: Workload) -> tuple[nn.Module, list[str]]:
    """PEFT LoRA with an adapter for each row of a batch."""
    model: Any = networks.lora(copy.deepcopy(base), load)
    names = ["default"]
    for i in range(1, ADAPTERS):
        names.append(f"task{i}")
        model.add_adapter(names[-1], model.peft_config["default"], autocast_adapter_dtype=False)
    return model.eval(), names


def measure(load: Workload, count: int, length: int, rows: Record) -> None:
    base = networks.base_of(load).eval()
    model = networks.spectral()(copy.deepcopy(base), load)
    with torch.no_grad():
        for _, layer in networks.adapted(model):
            layer.delta.zero_()  # values of no task would be lost, which is refused
    names = fill(fastspec.task_bank(model, TASKS), TASKS)
    own = model.task_bank.index([names[i * TASKS // count % TASKS] for i in range(count)])
    one = model.task_bank.index([names[0]] * count)
    ids = batch_of(count, length)
    what = f"{load.name} {count}x{length}"
    with torch.no_grad():
        check(base, model, ids, own)
        steps: dict[str, device.Step] = {
            ALL: lambda: model(input_ids=ids, tasks=own),
            ONE: lambda: model(input_ids=ids, tasks=one),
        }

        def plain() -> object:
            return base(input_ids=ids)

        timing = harness.pairwise(
            device.graphed(plain),
            {name: device.graphed(step) for name, step in steps.items()},
            ROUNDS,
            clock=device.on_device,
        )
        report(rows, f"{what} graphed", timing)
        if count == ADAPTERS:
            lora, adapters = many_adapters(base, load)
            steps[PEFT] = lambda: lora(input_ids=ids, adapter_names=adapters)
        timing = harness.pairwise(plain, steps, ROUNDS, clock=device.wall)
        report(rows, f"{what} eager", timing)


def report(rows: Record, name: str, timing: harness.Timing) -> None:
    ratios = {n: r.median for n, r in timing.ratios.items() if n != harness.FLOOR}
    rows.add(name, unadapted_ms=timing.floor_ms, noise=timing.noise, ratios=ratios)


def main() -> int:
    rows = Record("tasks")
    for load, count, length in BATCHES:
        name = f"{load.name} {count}x{length}"
        if rows.enough(pick(6, 0), name):
            with rows.row(name):
                measure(load, count, length, rows)
        device.free()
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
