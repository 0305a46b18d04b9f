"""Whole training steps: eager, in a CUDA graph and compiled, ours and others over the frozen floor."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import harness
import torch
from torch import Tensor

from gpu import device, networks
from gpu.device import pick
from gpu.networks import CANDIDATES, FLOOR, OURS, TrainingStep, Workload
from gpu.record import Record

ROUNDS = pick(9, 1)
EAGER_STEPS = 3  # between two synchronisations
RECOMPILATIONS = 64  # all blocks of all candidates share one function; the default is 8
OTHERS = ("PEFT LoRA r8", "EigenTune")  # compiled where time is left
TWICE = 2.0  # our error over that of the plain formulas in the same dtype


def gradients(step: TrainingStep) -> Tensor:
    """The gradients of all coefficients, one after the other."""
    step.loss().backward()
    found = [layer.delta.grad.double().flatten() for _, layer in networks.adapted(step.model)]
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
    del ours, plain, exact
    device.free()
    rows.add(f"{load} gradients", error=own, error_of_plain_formulas=theirs)
    if not own <= TWICE * theirs + 1e-6:
        raise AssertionError(f"gradients are off by {own:.2e}, plain formulas by {theirs:.2e}")


def losses(steps: Mapping[str, TrainingStep]) -> dict[str, float]:
    """Losses before training; those with small shifts must be the floor's, nearly."""
    found = {name: float(step.loss().detach()) for name, step in steps.items()}
    for name, loss in found.items():
        if not abs(loss - found[FLOOR]) <= 0.05 * abs(found[FLOOR]) + 0.05:
            raise AssertionError(f"{name}: loss {loss}, the floor's is {found[FLOOR]}")
    return found


def report(rows: Record, name: str, timing: harness.Timing, times: int = 1) -> None:
    ratios = {n: r.median for n, r in timing.ratios.items() if n != harness.FLOOR}
    spread = {n: [r.low, r.high] for n, r in timing.ratios.items() if n != harness.FLOOR}
    floor_ms = timing.floor_ms / times
    rows.add(name, floor_ms=floor_ms, noise=timing.noise, ratios=ratios, spread=spread)


def eager(load: Workload, steps: dict[str, TrainingStep], rows: Record) -> None:
    def times(step: TrainingStep) -> device.Step:
        return lambda: [step() for _ in range(EAGER_STEPS)]

    others = {name: times(step) for name, step in steps.items() if name != FLOOR}
    timing = harness.pairwise(times(steps[FLOOR]), others, ROUNDS, clock=device.wall)
    report(rows, f"{load} eager", timing, EAGER_STEPS)


def graphed(load: Workload, steps: dict[str, TrainingStep], rows: Record) -> None:
    before = losses(steps)
    graphs: dict[str, device.Step] = {}
    for name, step in steps.items():
        with rows.row(f"{load} graph of {name}"):
            graph = device.graphed(step)
            loss = float(graph().detach())  # type: ignore[attr-defined]
            if not abs(loss - before[name]) <= 0.02 * abs(before[name]) + 0.02:
                raise AssertionError(f"a replay's loss is {loss}, the step's {before[name]}")
            graphs[name] = graph
    floor = graphs.pop(FLOOR)
    timing = harness.pairwise(floor, graphs, ROUNDS, clock=device.on_device)
    report(rows, f"{load} graphed", timing)


def compiled(load: Workload, base: torch.nn.Module, names: tuple[str, ...], rows: Record) -> None:
    """The floor and some candidates, block by block; timed eager and, the host apart, in graphs."""
    steps: dict[str, TrainingStep] = {}
    for name in (FLOOR, *names):
        what = f"{load} compiling {name}"
        if not rows.enough(pick(15, 1), what):
            return
        with rows.row(what):
            step = networks.make(networks.floor if name == FLOOR else CANDIDATES[name], base, load)
            step.compile()
            rows.add(what, seconds=device.wall(step))
            steps[name] = step
    losses(steps)
    graphs = {name: device.graphed(step) for name, step in steps.items()}
    for how, clock, which in (
        ("compiled", device.wall, steps),
        ("compiled graphed", device.on_device, graphs),
    ):
        others = {name: step for name, step in which.items() if name != FLOOR}
        timing = harness.pairwise(which[FLOOR], others, ROUNDS, clock=clock)
        report(rows, f"{load} {how}{'' if OURS in names else ', others'}", timing)


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
    steps: dict[str, TrainingStep] = {}
    for name, prepare in {FLOOR: networks.floor, **CANDIDATES}.items():
        with rows.row(f"{load} {name}"):
            steps[name] = networks.make(prepare, base, load)
    losses(steps)
    eager(load, steps, rows)
    memory(load, steps, rows)
    graphed(load, steps, rows)


def main() -> int:
    rows = Record("steps")
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    for load in networks.WORKLOADS:
        if rows.enough(pick(8, 0), str(load)):
            with rows.row(str(load)):
                measure(load, rows)
        device.free()
    # compilation is slow: ours first, the others in what time is left
    for names in pick(((OURS,), OTHERS), ((OURS, *OTHERS),)):
        for load in networks.WORKLOADS:
            with rows.row(f"{load} compiled {names[0]}"):
                compiled(load, networks.base_of(load), names, rows)
            device.free()
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
