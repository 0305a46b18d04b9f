"""Many finished runs side by side: how stable their bases were, and whether that goes with their scores."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastspec.analyze.alignment import Alignment, align
from fastspec.analyze.weights import pairs

FEWEST_RUNS = 5


@dataclasses.dataclass(frozen=True)
class Stability:
    """One run, from its first weights to its last.

    Args:
        run: folder's name.
        label, task, start, labels, rate, seed: what was run.
        best: score of the best dev epoch, in points.
        alignments: of every matrix.
    """

    run: str
    label: str
    task: str
    start: str
    labels: str
    rate: float
    seed: int
    best: float
    alignments: list[Alignment]

    def summary(self) -> dict[str, Any]:
        """One line of a table: means over matrices, attention and MLP apart."""
        line: dict[str, Any] = {
            "task": self.task,
            "method": self.label,
            "start": self.start,
            "labels": self.labels,
            "rate": self.rate,
            "seed": self.seed,
            "best dev score": self.best,
        }
        for kind in ("attention", "mlp"):
            rows = [a.summary() for a in self.alignments if a.kind == kind]
            for column in ("cosine, leading tenth", "subspace, leading tenth", "norm of dW over W"):
                values = [row[column] for row in rows]
                line[f"{kind}: {column}"] = sum(values) / len(values) if values else ""
        return line


def stability(folder: str | os.PathLike[str]) -> Stability:
    """Compare the weights that a finished run began with and those it ended with.

    Raises:
        FileNotFoundError, ValueError: as `fastspec.glue.restore.finished`.
    """
    from pathlib import Path

    from fastspec.glue.record import read_result
    from fastspec.glue.restore import effective_weights, finished, starting_weights

    result = read_result(folder)
    config = result["config"]
    after = effective_weights(finished(folder).model)
    return Stability(
        run=Path(folder).name,
        label=result["label"],
        task=result["data"]["task"],
        start=config.get("start", "pretrained"),
        labels=config.get("labels", "true"),
        rate=result["rates"]["coefficients"],
        seed=config["seed"],
        best=result["best"]["score"],
        alignments=align(pairs(starting_weights(folder), after)),
    )


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman correlation over runs between a matrix's stability and the score.

    Args:
        matrix: its name.
        rho: of ranks within the task, in [-1, 1].
        p: two-sided, for no correlation.
        p_fdr: adjusted by Benjamini and Hochberg (1995), for a false discovery rate.
        p_holm: adjusted by Holm (1979), for any false discovery at all.
    """

    matrix: str
    rho: float
    p: float
    p_fdr: float
    p_holm: float


def generalisation(runs: Sequence[Stability]) -> list[Correlation]:
    """Does the stability of the leading tenth go with the score? One test a matrix, so p is adjusted.

    Scores and stabilities are centred within tasks, since tasks differ in both for reasons of their own.

    Raises:
        ValueError: fewer than 5 runs, or their matrices differ.
    """
    from scipy.stats import false_discovery_control, spearmanr

    if len(runs) < FEWEST_RUNS:
        raise ValueError(
            f"a correlation over {len(runs)} runs says nothing; give {FEWEST_RUNS} or more"
        )
    names = [a.name for a in runs[0].alignments]
    if any([a.name for a in run.alignments] != names for run in runs):
        raise ValueError("the runs have different matrices; give runs of one model")
    score = _within([run.task for run in runs], torch.tensor([run.best for run in runs]))
    found = []
    for i, name in enumerate(names):
        values = torch.tensor([_leading(run.alignments[i]) for run in runs])
        stable = _within([run.task for run in runs], values)
        if float(stable.abs().max()) < 1e-6 or float(score.abs().max()) == 0:
            continue  # a constant has no ranks: the matrix was not trained
        rho, p = spearmanr(stable.numpy(), score.numpy())
        found.append((name, float(rho), float(p)))
    if not found:
        return []
    p = [each[2] for each in found]
    fdr = false_discovery_control(p).tolist()
    return [
        Correlation(name.removesuffix(".weight"), rho, p, q, h)
        for (name, rho, p), q, h in zip(found, fdr, holm(p), strict=True)
    ]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: max over j <= i of (n - j + 1) p_(j), at most 1."""
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, highest = [0.0] * len(p), 0.0
    for j, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - j) * p[i]))
        adjusted[i] = highest
    return adjusted


def _leading(alignment: Alignment) -> float:
    tenth = max(1, len(alignment.s) // 10) - 1
    return float((alignment.overlap_left[tenth] + alignment.overlap_right[tenth]) / 2)


def _within(tasks: Sequence[str], values: Tensor) -> Tensor:
    """Values less the mean of their task."""
    out = values.double()
    for task in set(tasks):
        members = torch.tensor([t == task for t in tasks])
        out[members] -= out[members].mean()
    return out
