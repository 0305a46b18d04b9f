"""Many finished runs side by side: how much of their bases they kept, and whether that goes with the score.

A basis is stable where the leading singular vectors span the same space before and after training: where
the overlap of the two subspaces is near 1.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastspec.studies.analyze.alignment import Alignment, align
from fastspec.studies.analyze.weights import pairs

FEWEST_RUNS = 5


@dataclasses.dataclass(frozen=True)
class RunAlignment:
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

    def group(self) -> tuple[str, str, str]:
        """What runs must share for their scores to be compared."""
        return self.task, self.labels, self.start

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


def align_run(folder: str | os.PathLike[str]) -> RunAlignment:
    """Compare the weights that a finished run began with and those it ended with.

    Raises:
        FileNotFoundError, ValueError: as `fastspec.studies.glue.build.finished`.
    """
    from pathlib import Path

    from fastspec.studies.glue.build import effective_weights, finished, starting_weights
    from fastspec.studies.glue.result import read_result

    result = read_result(folder)
    config = result["config"]
    after = effective_weights(finished(folder).model)
    return RunAlignment(
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
    """Spearman correlation over runs between the subspace overlap of a matrix and the score.

    Args:
        matrix: its name.
        rho: of the centred values, in [-1, 1].
        p: two-sided, for no correlation.
        p_fdr: adjusted by Benjamini and Hochberg (1995), for a false discovery rate.
        p_holm: adjusted by Holm (1979), for any false discovery at all.
    """

    matrix: str
    rho: float
    p: float
    p_fdr: float
    p_holm: float


def generalisation(runs: Sequence[RunAlignment]) -> list[Correlation]:
    """Does the subspace overlap of the leading tenth go with the score? One test a matrix, so p is adjusted.

    Scores and overlaps are centred within runs of one task, kind of labels and start, since these differ
    in both for reasons of their own. A run that shares them with no other is left out.

    Raises:
        ValueError: fewer than 5 runs, or their matrices differ.
    """
    from scipy.stats import false_discovery_control, spearmanr

    runs = comparable(runs)
    if len(runs) < FEWEST_RUNS:
        raise ValueError(
            f"a correlation over {len(runs)} runs says nothing; give {FEWEST_RUNS} or more, each of which "
            "shares task, labels and start with another"
        )
    names = [a.name for a in runs[0].alignments]
    if any([a.name for a in run.alignments] != names for run in runs):
        raise ValueError("the runs have different matrices; give runs of one model")
    score = within_groups(runs, torch.tensor([run.best for run in runs]))
    found = []
    for i, name in enumerate(names):
        values = torch.tensor([_leading_overlap(run.alignments[i]) for run in runs])
        overlap = within_groups(runs, values)
        if float(overlap.abs().max()) < 1e-6 or float(score.abs().max()) == 0:
            continue  # a constant has no ranks: the matrix was not trained
        rho, p = spearmanr(overlap.numpy(), score.numpy())
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


def _leading_overlap(alignment: Alignment) -> float:
    """Mean squared cosine of the principal angles of the leading tenth's spans, left and right averaged."""
    tenth = max(1, len(alignment.s) // 10) - 1
    return float((alignment.overlap_left[tenth] + alignment.overlap_right[tenth]) / 2)


def comparable(runs: Sequence[RunAlignment]) -> list[RunAlignment]:
    """The runs that share task, labels and start with another."""
    groups = [run.group() for run in runs]
    return [run for run, group in zip(runs, groups, strict=True) if groups.count(group) > 1]


def within_groups(runs: Sequence[RunAlignment], values: Tensor) -> Tensor:
    """One value a run, less the mean over the runs of its task, labels and start."""
    out = values.double()
    groups = [run.group() for run in runs]
    for group in set(groups):
        members = torch.tensor([g == group for g in groups])
        out[members] -= out[members].mean()
    return out
