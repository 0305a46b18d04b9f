"""Whole training steps, eager and in a CUDA graph: ours and others over the frozen floor; peak memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import harness
import torch
from torch import Tensor

import fastspec
from gpu import device, networks
from gpu.device import pick
from gpu.networks import CANDIDATES, FLOOR, KEPT, LORA, OURS, TrainingStep, Workload
from gpu.record import Record

ROUNDS = pick(9, 1)
TRAINED = 6  # steps whose losses are compared
TIMES = 3  # steps between two marks of the clock
TWICE = 2.0  # our error over that of the plain formulas in the same dtype


def gradients(step: TrainingStep) -> Tensor:
    """The gradients of all coefficients, ours or EigenTune's, one after the other."""
    step.loss().backward()
    trained = step.model.named_parameters()
    found = [p.grad.double().flatten() for name, p in trained if name.endswith(".delta")]
    step.optimizer.zero_grad()
    return torch.cat(found)


def check(load: Workload, base: torch.nn.Module, rows: Record) -> None:
    """Our gradients against the plain formulas in float32, beside those formulas in the model's dtype."""
    ours = networks.make(networks.spectral(), base, load)
    plain = networks.plain(ours, load)
    exact = networks.plain(ours, load)
    exact.model.float()
    want = gradients(exact)

    def error(step: TrainingStep) -> float:
        return float((gradients(step) - want).norm() / want.norm())

    own, theirs = error(ours), error(plain)
    with rows.row(f"{load} gradients with copies kept"):
        copies = networks.make(networks.kept, base, load)
        first = error(copies)  # each layer for itself; then all at once, and from shared inputs
        rows.add(f"{load} gradients with copies kept", off=[first, error(copies), error(copies)])
        del copies
    with rows.row(f"{load} gradients of EigenTune"):
        theirs_too = error(networks.make(networks.eigentune, base, load))
        rows.add(f"{load} gradients of EigenTune", off=theirs_too)
    del ours, plain, exact
    device.free()
    rows.add(f"{load} gradients", off=own, plain_formulas_off=theirs)
    if not own <= TWICE * theirs + 1e-6:
        raise AssertionError(f"gradients are off by {own:.2e}, plain formulas by {theirs:.2e}")


def trained_by_graphed(load: Workload, base: torch.nn.Module, rows: Record) -> None:
    """Losses of `fastspec.graphed` beside those of the same steps made one by one, on other batches each."""
    for label, prepare in ((OURS, networks.spectral()), (KEPT, networks.kept)):
        name = f"{load} losses of fastspec.graphed, {label}"
        with rows.row(name):
            eager, captured = (networks.make(prepare, base, load) for _ in range(2))
            for step in (eager, captured):
                for group in step.optimizer.param_groups:
                    group["lr"] = 1e-3
            replay = fastspec.graphed(captured.model, captured.optimizer, captured.batch)
            off = []
            for i in range(TRAINED):
                batch = captured.batch | {"input_ids": (captured.batch["input_ids"] + i) % 100}
                eager.batch = batch
                want = float(eager().detach())
                off.append(abs(float(replay(**batch)) / want - 1))
            rows.add(name, off=off)
            if not max(off) <= 0.02:
                raise AssertionError(f"losses are off by {max(off):.1e}")
        device.free()


def losses(steps: Mapping[str, TrainingStep]) -> dict[str, float]:
    """Losses before training; those with small shifts must be the floor's, nearly."""
    found = {name: float(step.loss().detach()) for name, step in steps.items()}
    for name, loss in found.items():
        if not abs(loss - found[FLOOR]) <= 0.05 * abs(found[FLOOR]) + 0.05:
            raise AssertionError(f"{name}: loss {loss}, the floor's is {found[FLOOR]}")
    return found


def compare(
    name: str, steps: Mapping[str, device.Step], rows: Record, clock: Callable[[device.Step], float]
) -> None:
    """Steps over the floor's, some in a row: as in training, the host may run ahead."""

    def times(step: device.Step) -> device.Step:
        return lambda: [step() for _ in range(TIMES)]

    others = {n: times(step) for n, step in steps.items() if n != FLOOR}
    timing = harness.pairwise(times(steps[FLOOR]), others, ROUNDS, clock=clock)
    rows.add(
        name,
        floor_ms=timing.floor_ms / TIMES,
        noise=timing.noise,
        ratios={n: timing.ratios[n].median for n in others},
        low={n: timing.ratios[n].low for n in others},
        high={n: timing.ratios[n].high for n in others},
    )


def in_graphs(
    load: Workload, steps: Mapping[str, TrainingStep], rows: Record
) -> dict[str, device.Step]:
    """A graph of each whole step whose replay has the step's loss."""
    before = {name: float(step.loss().detach()) for name, step in steps.items()}
    graphs: dict[str, device.Step] = {}
    for name, step in steps.items():
        with rows.row(f"{load} graph of {name}"):
            graph = device.graphed(step)
            loss = float(graph().detach())  # type: ignore[attr-defined]
            if not abs(loss - before[name]) <= 0.02 * abs(before[name]) + 0.02:
                raise AssertionError(f"a replay's loss is {loss}, the step's {before[name]}")
            graphs[name] = graph
    return graphs


def memory(load: Workload, steps: dict[str, TrainingStep], rows: Record) -> None:
    """Peaks of a step above what is held before it, and what p of all layers takes."""
    peaks = {name: device.peak_bytes(step) for name, step in steps.items()}
    layers = list(networks.adapted(steps[OURS].model))
    p = load.rows * sum(layer.rank * layer.weight.element_size() for _, layer in layers)
    rows.add(
        f"{load} memory",
        floor_mb=peaks[FLOOR] / 1e6,
        p_of_all_layers_mb=p / 1e6,
        above_the_floor_mb={
            n: (peak - peaks[FLOOR]) / 1e6 for n, peak in peaks.items() if n != FLOOR
        },
    )


def measure(load: Workload, rows: Record) -> None:
    base = networks.base_of(load)
    check(load, base, rows)
    if load is networks.MINILM:
        trained_by_graphed(load, base, rows)
    steps: dict[str, TrainingStep] = {}
    for name, prepare in {FLOOR: networks.floor, **CANDIDATES}.items():
        with rows.row(f"{load} {name}"):
            steps[name] = networks.make(prepare, base, load)
    losses(steps)
    compare(f"{load} eager", steps, rows, device.wall)
    memory(load, steps, rows)
    graphs = in_graphs(load, steps, rows)
    compare(f"{load} graphed", graphs, rows, device.on_device)
    if load.targets == networks.ENCODER and rows.enough(pick(12, 0), f"{load} parts of copies"):
        graphs = {FLOOR: graphs[FLOOR]}
        parts = {name: networks.make(p, base, load) for name, p in networks.PARTS.items()}
        graphs |= in_graphs(load, parts, rows)
        compare(f"{load} graphed, parts of kept copies", graphs, rows, device.on_device)


def under_autocast(load: Workload, rows: Record) -> None:
    """The commonest set-up of Trainer: a float32 model, products in bfloat16."""
    base = networks.base_of(load, torch.float32)
    prepared = {FLOOR: networks.floor, OURS: networks.spectral(), LORA: networks.lora}
    steps = {name: networks.make(p, base, load, autocast=True) for name, p in prepared.items()}
    losses(steps)
    compare(f"{load} eager, autocast over float32", steps, rows, device.wall)
    graphs = in_graphs(load, steps, rows)
    compare(f"{load} graphed, autocast over float32", graphs, rows, device.on_device)


def main() -> int:
    rows = Record("steps")
    for load in networks.WORKLOADS:
        if rows.enough(pick(8, 0), str(load)):
            with rows.row(str(load)), device.as_on_card():
                measure(load, rows)
        device.free()
    load = networks.MINILM
    if rows.enough(pick(8, 0), f"{load} autocast"):
        with rows.row(f"{load} autocast"), device.as_on_card():
            under_autocast(load, rows)
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
