"""What the study runs: methods, their sizes, and the learning rate at which each search starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from fastspec.config import Rank
from fastspec.cores import Core
from fastspec.studies.glue.presets import MLP, VALUES

PRETRAINED = "pretrained"
REFERENCE = "LoRA r8"  # what every other row is compared with


@dataclasses.dataclass(frozen=True)
class Row:
    """One method of the table.

    Args:
        name: in the table and the record.
        start: the learning rate that is tried first, one of `rate`'s.
        method: "spectral", or "lora" (alpha = 2 r, all linear layers, no dropout).
        rank, core, half_width, target_modules: as in `fastspec.SpectralConfig`; of LoRA the rank alone.
        core_map: what makes the core from other trained numbers (`fastspec.studies.core_maps`).
        seeds: how many are run at the best rate.
    """

    name: str
    start: float
    method: Literal["spectral", "lora"] = "spectral"
    rank: Rank = 32
    core: Core = "diag"
    half_width: int = 1
    target_modules: str = "all-linear"
    core_map: str | None = None
    seeds: int = 1


# Shares are SmolLM2-135M's, of which 0.2 % are 269,030 numbers. Bands, dense cores and subsets of layers
# are as large as that allows.
ROWS = (
    Row(REFERENCE, 1e-3, "lora", 8, seeds=3),
    Row("coefficients, all directions", 3e-2, rank="full", seeds=3),
    Row("band 1, 0.9 of the directions", 3e-2, rank=0.9, core="band", seeds=3),
    Row("dense 35", 3e-2, rank=35, core="dense", seeds=3),
    Row(
        "band 5, values and outputs",
        3e-2,
        rank="full",
        core="band",
        half_width=5,
        target_modules=VALUES,
    ),
    Row("band 2, MLP", 3e-2, rank="full", core="band", half_width=2, target_modules=MLP, seeds=3),
    Row("dense 54, MLP", 3e-2, rank=54, core="dense", target_modules=MLP),
    Row("LoRA r1", 3e-3, "lora", 1),
    Row(
        "band 1, 0.9 of the directions, by the spectrum",
        3e-2,
        rank=0.9,
        core="band",
        core_map="left",
    ),
    Row("hartley, all directions", 3e-2, rank="full", core="dense", core_map="hartley"),
    Row("low-rank 1, all directions", 1e-2, rank="full", core="low_rank", seeds=3),
)


def rate(step: int) -> float:
    """The ladder of learning rates: 1, 3, 10, 30, ... by the place on it; 0 is 1."""
    return float(f"{10 ** (step / 2):.0e}")


def place(value: float) -> int:
    """The place of a rate on the ladder."""
    return round(2 * math.log10(value))


def next_rate(start: float, losses: Mapping[float, float]) -> float | None:
    """The rate to try next, given the losses of those tried; None when the best has both neighbours tried.

    So no best rate is the end of a grid. A run that diverged counts as an infinite loss.
    """
    if not losses:
        return start
    on_ladder = {value: loss for value, loss in losses.items() if value == rate(place(value))}
    middle = place(best_rate(on_ladder))
    for neighbour in (rate(middle + 1), rate(middle - 1)):
        if neighbour not in losses:
            return neighbour
    return None


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate of the least loss, the lower of equals."""
    return min(losses, key=lambda value: (losses[value], value))
