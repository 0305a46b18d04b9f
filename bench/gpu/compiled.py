"""Whole training steps under torch.compile, ours first: compilation is slow, and takes what time there is."""

from __future__ import annotations

import sys

import torch

from gpu import device, networks
from gpu.device import pick
from gpu.networks import CANDIDATES, FLOOR, OURS, TrainingStep, Workload
from gpu.record import Record
from gpu.steps import compare, in_graphs, losses

OTHERS = ("PEFT LoRA r8", "EigenTune")
RECOMPILATIONS = 64  # all blocks of all candidates share one function; the default is 8


def measure(load: Workload, names: tuple[str, ...], rows: Record) -> None:
    """The floor and some candidates, block by block; timed eager and, the host apart, in graphs."""
    base = networks.base_of(load)
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
    rest = "" if OURS in names else ", others"
    losses(steps)
    compare(f"{load} compiled{rest}", steps, rows, device.wall)
    graphs = in_graphs(load, steps, rows)
    compare(f"{load} compiled graphed{rest}", graphs, rows, device.on_device)


def main() -> int:
    rows = Record("compiled")
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    for names in pick(((OURS,), OTHERS), ((OURS, *OTHERS),)):
        for load in pick(networks.WORKLOADS, networks.WORKLOADS[:1]):
            with rows.row(f"{load} compiled {names[0]}"):
                measure(load, names, rows)
            device.free()
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
