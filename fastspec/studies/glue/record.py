"""What a suite's table needs of a run, and the file that keeps it: one CSV line a run.

Run folders are large and stay on their machine; the record is small, is committed, and lets a suite go on
anywhere.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastspec.files import write_atomically
from fastspec.studies.csv_record import read_lines
from fastspec.studies.encoders import public_name
from fastspec.studies.glue.config import GRADIENT, RANDOM_MODEL, GlueConfig
from fastspec.studies.glue.result import DIVERGED, RESULT, compare, read_json, read_result

OUTPUT = Path("runs/suite")
DIGITS = 16  # of a SHA-256 in hexadecimal: enough to tell two apart


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished or diverged run of a suite.

    Args:
        task, row, rate, seed: which run of the suite it is.
        best, last: scores of the best and of the last dev epoch, in points; None if it diverged.
        adapter, head, total: parameters trained beside the head and in it, and all; None if it diverged.
        rows: trained on; None if it diverged.
        epochs, batch_size: as in `GlueConfig`.
        step_ms: median time of a training step; None if it diverged.
        fingerprint, digest: the first digits of those of the body that training began with and of the
            training rows.
        command: `command_text` of its configuration.
        loss_difference, score_difference, best_difference, differing, predictions: for rows of the
            reference path, as in `fastspec.studies.glue.result.Comparison`, seen from the fused path.
    """

    task: str
    row: str
    rate: float
    seed: int
    best: float | None
    last: float | None
    adapter: int | None
    head: int | None
    total: int | None
    rows: int | None
    epochs: int
    batch_size: int
    step_ms: float | None
    fingerprint: str
    digest: str
    command: str
    loss_difference: float | None = None
    score_difference: float | None = None
    best_difference: float | None = None
    differing: int | None = None
    predictions: int | None = None

    @property
    def diverged(self) -> bool:
        return self.best is None

    def where(self) -> str:
        return f"{self.task} {self.row}, rate {self.rate:g}, seed {self.seed}"


def command_text(config: GlueConfig) -> str:
    """The command that makes a run, the same on every machine.

    The folder of the rows is left out, since their digest tells them apart, a model in a folder goes by
    its own name, and a basis of a suite's run is named as if the suite were in its default folder.
    """
    basis = config.basis_model
    if basis is not None and basis not in (RANDOM_MODEL, GRADIENT):
        basis = str(OUTPUT.joinpath(*Path(basis).parts[-3:]))
    model = None if config.model is None else public_name(config.model)
    everywhere = dataclasses.replace(config, model=model, data=None, basis_model=basis)
    return shlex.join(["fastspec", "glue", *flags(everywhere)])


def flags(config: GlueConfig) -> list[str]:
    """The flags of `fastspec glue` for every field that is not at its default."""
    words = []
    for field in dataclasses.fields(GlueConfig):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        if isinstance(value, tuple):
            words.append("{}:{}".format(*value))
        elif not isinstance(value, bool):
            words.append(str(value))
    return words


def read_folder(folder: Path, row: str, fused: Path | None = None) -> Run | None:
    """The run of `row` in `folder`, None if there is none that has ended.

    Args:
        folder: of `fastspec glue --output`.
        row: name of its row.
        fused: for a run of the reference path, the folder of the same run on the fused path.
    """
    if (folder / RESULT).exists():
        return _finished(read_result(folder), row, read_result(fused) if fused else None)
    if not (folder / DIVERGED).exists():
        return None
    config = GlueConfig.from_dict(read_json(folder / "config.json"))
    inputs = read_json(folder / "inputs.json")
    fields = dict.fromkeys(("best", "last", "adapter", "head", "total", "rows", "step_ms"))
    return _run(config, row, inputs["model"], inputs["rows"]["train"], fields)


def _finished(result: dict[str, Any], row: str, fused: dict[str, Any] | None) -> Run:
    fields = {
        "best": round(result["best"]["score"], 4),
        "last": round(result["last"]["score"], 4),
        **{part: result["parameters"][part] for part in ("adapter", "head", "total")},
        "rows": result["data"]["rows"]["trained on"],
        "step_ms": round(result["step_ms"], 1),
    }
    if fused is not None:
        c = compare(fused, result)
        fields |= {
            "loss_difference": float(f"{c.loss_difference:.2e}"),
            "score_difference": round(c.score_difference, 4),
            "best_difference": round(c.best_difference, 4),
            "differing": c.differing,
            "predictions": c.predictions,
        }
    config = GlueConfig.from_dict(result["config"])
    digest = result["data"]["sha256"]["train"]
    return _run(config, row, result["model"]["fingerprint"], digest, fields)


def _run(
    config: GlueConfig, row: str, fingerprint: str, digest: str, fields: dict[str, Any]
) -> Run:
    assert config.lr is not None
    return Run(
        task=config.task,
        row=row,
        rate=config.lr,
        seed=config.seed,
        epochs=config.epochs,
        batch_size=config.batch_size,
        fingerprint=fingerprint[:DIGITS],
        digest=digest[:DIGITS],
        command=command_text(config),
        **fields,
    )


def check_alike(a: Run, b: Run) -> None:
    """Raise ValueError if two runs of one task are of other rows or of another pretrained model."""
    names = ["digest"]
    # an untrained body is another one for every seed
    if not any("--start random" in run.command for run in (a, b)):
        names.append("fingerprint")
    for name in names:
        if getattr(a, name) != getattr(b, name):
            what = "training rows" if name == "digest" else "pretrained model"
            raise ValueError(
                f"two runs can't stand in one table, their {what} differ by {name}: "
                f"{getattr(a, name)} ({a.where()}), {getattr(b, name)} ({b.where()}); "
                "name another --record and --output, or remove the runs of one of the two"
            )


FIELDS = tuple(dataclasses.fields(Run))
COLUMNS = (*(f.name for f in FIELDS), "chosen")


def to_csv(runs: Sequence[Run]) -> str:
    """One line a run, with "chosen": 1 where no rate tried scored better on the row's first seed."""
    best: dict[str, tuple[int, float, float]] = {}
    for run in runs:
        if run.best is not None:
            # the first seed, then the best score, then the lowest rate
            key = (run.seed, -run.best, run.rate)
            best[_search(run)] = min(best.get(_search(run), key), key)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        chosen = not run.diverged and best[_search(run)][2] == run.rate
        values = [getattr(run, f.name) for f in FIELDS]
        writer.writerow(["" if v is None else v for v in values] + [int(chosen)])
    return out.getvalue()


def _search(run: Run) -> str:
    """What the runs of one row on one task have in common."""
    return f"{run.task} {run.row} " + re.sub(r" --(lr|seed) \S+", "", run.command)


def _place(run: Run) -> tuple[str, str, float, int, str]:
    return run.task, run.row, run.rate, run.seed, run.command


def read_csv(path: Path) -> list[Run]:
    """The runs that `to_csv` wrote; none if there is no such file.

    Raises:
        ValueError: a column is missing or a value is none of its kind; the message names the line.
    """
    return read_lines(path, Run)


def add_to_record(path: Path, runs: Iterable[Run]) -> None:
    """Add to the record in `path` those of `runs` that it does not have; what is there stays, and lines are
    in an order of their own, so that records of two machines are merged easily."""
    there = read_csv(path)
    known = {(run.row, run.command) for run in there}
    new = [run for run in runs if (run.row, run.command) not in known]
    text = to_csv(sorted([*there, *new], key=_place))
    if not path.exists() or path.read_text("utf-8") != text:
        write_atomically(path, text.encode())
