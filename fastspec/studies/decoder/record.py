"""The record of the study's runs, what is still to run, and the table."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from fastspec.files import write_atomically
from fastspec.studies.csv_record import read_lines
from fastspec.studies.decoder.rows import PRETRAINED, REFERENCE, Row, best_rate, next_rate


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished or diverged run.

    Args:
        row, rate, seed: which run it is; of the pretrained model the rate is 0.
        default: `fastspec.default_rate` of the row; None for the pretrained model and LoRA.
        loss: held out, in nats a token; None if it diverged.
        trained, total: numbers trained, and all of the pretrained model.
        steps, batch, length: of training; blocks a step and tokens a block.
        held_out: blocks the loss is a mean of.
        model: its name, with the first digits of the fingerprint of its weights.
        text: the first digits of the texts' SHA-256, which another Python may have otherwise.
    """

    row: str
    rate: float
    seed: int
    default: float | None
    loss: float | None
    trained: int
    total: int
    steps: int
    batch: int
    length: int
    held_out: int
    model: str
    text: str

    @property
    def setting(self) -> tuple:
        """What all runs of one table have in common."""
        return self.steps, self.batch, self.length, self.held_out, self.model, self.text, self.total


COLUMNS = tuple(field.name for field in dataclasses.fields(Run))


def read(path: Path) -> list[Run]:
    """The runs of a record.

    Raises:
        ValueError: the file is damaged, or its runs are of more than one setting.
    """
    runs = read_lines(path, Run)
    for run in runs:
        if run.setting != runs[0].setting:
            raise ValueError(
                f"{path} holds runs of two settings, which no table can compare: {runs[0].setting} and "
                f"{run.setting}; name another --record"
            )
    return runs


def add(path: Path, run: Run) -> None:
    """Add a run to the record, whole or not at all."""
    runs = sorted({*read(path), run}, key=lambda r: (r.row, r.rate, r.seed))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for r in runs:
        writer.writerow(["" if (v := getattr(r, c)) is None else v for c in COLUMNS])
    write_atomically(path, out.getvalue().encode())


def losses(row: Row, runs: Sequence[Run], seed: int = 0) -> dict[float, float]:
    """Held-out loss by rate, infinite where the run diverged."""
    return {
        run.rate: math.inf if run.loss is None else run.loss
        for run in runs
        if run.row == row.name and run.seed == seed
    }


def next_run(rows: Sequence[Row], runs: Sequence[Run]) -> tuple[Row, float, int] | None:
    """(row, rate, seed) of what is to be run next; None when all is done.

    Rows with several seeds come first: their searches, the default rate too, then their seeds. Then the
    others' searches.
    """
    headline = [row for row in rows if row.seeds > 1]
    for group in (headline, [row for row in rows if row.seeds == 1]):
        for row in group:
            tried = losses(row, runs)
            rate = next_rate(row.start, tried)
            if rate is None and (default := default_of(row, runs)) not in tried:
                rate = default
            if rate is not None:
                return row, rate, 0
        for seed in range(1, max((row.seeds for row in group), default=0)):
            for row in group:
                rate = best_rate(losses(row, runs))
                if seed < row.seeds and rate not in losses(row, runs, seed):
                    return row, rate, seed
    return None


def default_of(row: Row, runs: Sequence[Run]) -> float | None:
    """What `fastspec.default_rate` says for the row, once it was run."""
    return next((run.default for run in runs if run.row == row.name), None)


def table(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """The runs as a Markdown table, the rows in their order and only those that were run."""
    lines = [
        "| method | trained | held-out loss | over LoRA r8 | rate | at the default rate | seed 0, by rate |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    pretrained = next((run for run in runs if run.row == PRETRAINED), None)
    if pretrained is not None:
        lines.append(f"| {PRETRAINED} | 0 | {pretrained.loss:.3f} | | | | |")
    reference = next((_at_best(row, runs) for row in rows if row.name == REFERENCE), {})
    for row in rows:
        by_seed = _at_best(row, runs)
        if not by_seed:
            continue
        tried = losses(row, runs)
        rate = best_rate(tried)
        found = list(by_seed.values())
        middle = median(found)
        spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
        missing = "" if len(found) == row.seeds else f", {len(found)} of {row.seeds} seeds"
        open_end = "" if next_rate(row.start, tried) is None else ", search unfinished"
        run = next(run for run in runs if run.row == row.name)
        theirs = [loss for seed, loss in reference.items() if seed in by_seed]  # of the same seeds
        over = f"{100 * (middle / median(theirs) - 1):+.1f} %" if theirs else ""
        default = default_of(row, runs)
        at_default = ""
        if default is not None:
            at_default = (
                f"{default:g}: {_loss(tried[default])}" if default in tried else f"{default:g}"
            )
        by_rate = "; ".join(
            f"{r:g}: {_loss(loss)}" for r, loss in sorted(tried.items()) if r != default
        )
        lines.append(
            f"| {row.name} | {run.trained:,} ({100 * run.trained / run.total:.3f} %) | "
            f"{middle:.3f}{spread}{missing} | {over} | {rate:g}{open_end} | {at_default} | {by_rate} |"
        )
    return "\n".join(lines)


def _at_best(row: Row, runs: Sequence[Run]) -> dict[int, float]:
    """The loss by seed at the best rate of seed 0; nothing where nothing was run."""
    tried = losses(row, runs)
    if not tried or math.isinf(min(tried.values())):
        return {}
    rate = best_rate(tried)
    by_seed = {seed: losses(row, runs, seed) for seed in range(row.seeds)}
    return {seed: found[rate] for seed, found in by_seed.items() if rate in found}


def _loss(value: float) -> str:
    return "diverged" if math.isinf(value) else f"{value:.3f}"
