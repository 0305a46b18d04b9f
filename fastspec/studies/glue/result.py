"""The result of a run on disk, and the comparison of two of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULT = "result.json"
DIVERGED = "diverged.json"
ADAPTER = "adapter"
COMPARED_STEPS = 50


def read_json(path: Path) -> Any:
    """The JSON in `path`; ValueError names the file when it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not readable as JSON: {e}") from None


def read_result(path: str | os.PathLike) -> dict[str, Any]:
    """A result file, or the one in a run's folder."""
    path = Path(path)
    if path.is_dir():
        path = path / RESULT
    result = read_json(path)
    if not isinstance(result, dict) or "losses" not in result:
        raise ValueError(f"{path}: not a result of fastspec glue")
    return result


def environment() -> dict[str, Any]:
    """Versions and thread count: what a repeat on another machine has to match."""
    import torch

    import fastspec

    packages = ("torch", "transformers", "datasets", "accelerate", "peft", "scikit-learn", "scipy")
    versions = {"fastspec": fastspec.__version__, "python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": f"{platform.system()} {platform.machine()}",
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far two runs of one task lie apart.

    Args:
        steps: steps compared, at most the first 50.
        loss_difference: largest |a - b| / |a| over those steps.
        loss_step: the step it occurred at, from 1.
        score_difference: last epoch's score of b less that of a, in points.
        best_difference: the same for the best epochs.
        differing: dev predictions of the last epoch that differ, out of `predictions`.
    """

    steps: int
    loss_difference: float
    loss_step: int
    score_difference: float
    best_difference: float
    differing: int
    predictions: int

    def __str__(self) -> str:
        return (
            f"losses of the first {self.steps} steps: largest relative difference "
            f"{self.loss_difference:.2e} (step {self.loss_step})\n"
            f"score: last epoch {self.score_difference:+.2f} points, "
            f"best epoch {self.best_difference:+.2f} points\n"
            f"dev predictions of the last epoch that differ: {self.differing} of {self.predictions}"
        )


def compare(result_a: dict[str, Any], result_b: dict[str, Any]) -> Comparison:
    """Compare two results of the same task, rows and batch size; b is seen from a.

    For regression a prediction differs when it moved by more than 1e-3 of the label range.

    Raises:
        ValueError: the results are not of the same training rows, so that steps don't correspond.
    """
    for name, part in (("data", "sha256"), ("data", "rows"), ("config", "batch_size")):
        a, b = result_a[name][part], result_b[name][part]
        if a != b:
            raise ValueError(
                f"the runs can't be compared: {name}.{part} is {a} in one, {b} in the other"
            )
    pairs = list(zip(result_a["losses"], result_b["losses"], strict=False))[:COMPARED_STEPS]
    if not pairs:
        raise ValueError("can't compare these runs: one of them has no steps")
    differences = [abs(a - b) / max(abs(a), 1e-30) for a, b in pairs]
    worst = max(range(len(pairs)), key=differences.__getitem__)
    tolerance = result_a["regression_tolerance"]
    differing = total = 0
    for split, a in result_a["predictions"]["last"].items():
        b = result_b["predictions"]["last"][split]
        total += len(a)
        differing += sum(abs(x - y) > tolerance for x, y in zip(a, b, strict=True))
    return Comparison(
        steps=len(pairs),
        loss_difference=differences[worst],
        loss_step=worst + 1,
        score_difference=result_b["last"]["score"] - result_a["last"]["score"],
        best_difference=result_b["best"]["score"] - result_a["best"]["score"],
        differing=differing,
        predictions=total,
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results of finished runs as a Markdown table, in the order given."""
    header = (
        "task", "method", "seed", "epochs x batch", "rate", "head rate",
        "trained beside the head", "best epoch", "last epoch",
    )  # fmt: skip
    rows = [header, ("---",) * 3 + ("---:",) * (len(header) - 3)]
    for result in results:
        config, parameters, rates = (result[name] for name in ("config", "parameters", "rates"))
        kind = "coefficients" if config["method"] == "spectral" else "adapter"
        share = 100 * parameters["adapter"] / parameters["total"]
        rows.append(
            (
                result["data"]["task"],
                result["label"],
                str(config["seed"]),
                f"{config['epochs']} x {config['batch_size']}",
                "" if config["method"] == "head" else f"{rates[kind]:g}",
                f"{rates['head']:g}",
                f"{parameters['adapter']:,} ({share:.3f} %)",
                f"{result['best']['score']:.1f}",
                f"{result['last']['score']:.1f}",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
