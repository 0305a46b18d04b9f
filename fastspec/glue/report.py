"""What a suite's runs say: a Markdown table, one CSV line a run, and a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastspec.files import write_atomically
from fastspec.glue.record import compare, read_result
from fastspec.glue.rows import Row
from fastspec.glue.suite import Job, Suite, flags
from fastspec.glue.tasks import TASKS
from fastspec.glue.timing import FLOOR, StepTime

TABLE, RUNS, PICTURE, TIMING = "table.md", "runs.csv", "scores.png", "timing.json"
COLUMNS = (
    "task", "row", "rate", "seed", "chosen", "best", "last", "adapter", "head", "total", "step_ms",
    "fingerprint", "command",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """The finished runs of one row on one task, at one rate.

    Args:
        rate: of all of them: the row's choice, or while its search is unfinished the best so far.
        searched: how many rates of the row's grid were tried, and how many it has.
        best, last: scores by seed, of the best and of the last dev epoch, in points.
        result: of the first of them, for what does not depend on the seed.
    """

    rate: float
    searched: tuple[int, int]
    best: dict[int, float]
    last: dict[int, float]
    result: dict[str, Any]


def cell(suite: Suite, task: str, row: Row) -> Cell | None:
    """What is finished of one row on one task; None if nothing is."""
    grid = row.rates or suite.row(row.like or "").rates
    finished = {
        (rate, seed): read_result(folder)
        for rate in grid
        for seed in range(suite.seeds_of(row))
        if ((folder := Job(task, row, rate, seed).folder(suite.output)) / "result.json").exists()
    }
    if not finished:
        return None
    first = min(seed for _, seed in finished)
    rates = sorted(rate for rate, seed in finished if seed == first)
    rate = max(rates, key=lambda r: finished[r, first]["best"]["score"])
    ours = {seed: result for (r, seed), result in finished.items() if r == rate}
    tried = sum(suite.score(Job(task, row, r, 0)) is not None for r in grid)
    return Cell(
        rate,
        (tried, len(grid)) if row.rates else (0, 0),
        {seed: r["best"]["score"] for seed, r in ours.items()},
        {seed: r["last"]["score"] for seed, r in ours.items()},
        ours[first],
    )


def cells(suite: Suite) -> dict[str, dict[str, Cell]]:
    """`cell` by row and task, of the rows and tasks that have any."""
    found = {
        row.name: {t: c for t in suite.tasks if (c := cell(suite, t, row)) is not None}
        for row in suite.rows
    }
    return {name: by_task for name, by_task in found.items() if by_task}


def spread(values: Mapping[int, float], seeds: int) -> str:
    """ "median (least to largest)"; how many of the `seeds` are there, where that is not all."""
    text = f"{statistics.median(values.values()):.1f}"
    if len(values) > 1:
        text += f" ({min(values.values()):.1f} to {max(values.values()):.1f})"
    return text if len(values) == seeds else f"{text}, {len(values)} of {seeds} seeds"


def markdown(suite: Suite, times: Mapping[str, StepTime] | None = None) -> str:
    """The table. Scores are of the best dev epoch, last epoch's medians in brackets."""
    found = cells(suite)
    header = [
        "method",
        "trained beside the head",
        "with the head",
        *suite.tasks,
        "mean",
        "last epoch",
    ]
    header += ["rates"] + (["step", "saved"] if times else [])
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in suite.rows:
        by_task = found.get(row.name)
        if by_task is None:
            continue
        counts = next(iter(by_task.values())).result["parameters"]
        both = counts["adapter"] + counts["head"]
        line = [row.name, _share(counts["adapter"], counts["total"]), _share(both, counts["total"])]
        seeds = suite.seeds_of(row)
        line += [spread(by_task[t].best, seeds) if t in by_task else "" for t in suite.tasks]
        line += [_mean(by_task, suite.tasks, "best"), _mean(by_task, suite.tasks, "last")]
        line.append(", ".join(_rate(by_task[t]) if t in by_task else "-" for t in suite.tasks))
        if times:
            time = times.get(row.name)
            line += [f"{time.ratio:.2f}", f"{time.saved:.2f}"] if time else ["", ""]
        rows.append(line)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", _caption(suite, found, times)]
    parity = parity_table(suite)
    if parity:
        lines += ["", "Fused path (a) and reference path (b), the same seed:", "", parity]
    return "\n".join(lines)


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.3f} %)"


def _mean(by_task: Mapping[str, Cell], tasks: tuple[str, ...], which: str) -> str:
    if any(task not in by_task for task in tasks):
        return ""
    medians = [statistics.median(getattr(by_task[t], which).values()) for t in tasks]
    return f"{statistics.mean(medians):.1f}"


def _rate(cell: Cell) -> str:
    tried, of = cell.searched
    return f"{cell.rate:g}" + (f" ({tried} of {of} tried)" if tried < of else "")


def _caption(
    suite: Suite, found: Mapping[str, Mapping[str, Cell]], times: Mapping[str, StepTime] | None
) -> str:
    first: dict[str, dict[str, Any]] = {}
    for by_task in found.values():
        for task, c in by_task.items():
            first.setdefault(task, c.result)
    sizes = [
        f"{task} {r['data']['rows']['trained on']:,} rows, {r['config']['epochs']} epochs of batches "
        f"of {r['config']['batch_size']}"
        for task, r in first.items()
    ]
    text = (
        'Scores in points, median (least to largest) over seeds, of the best dev epoch; "last epoch": '
        "the mean over tasks of the last epoch's medians. Rates: by task, chosen on seed 0 by the best "
        "dev epoch, so seed 0 is scored on the rows that chose its rate. " + "; ".join(sizes) + "."
    )
    if times:
        text += (
            f" Step, saved: time of a training step and bytes kept for its backward pass, over those "
            f"of the {FLOOR} ({times[FLOOR].milliseconds:.0f} ms)."
        )
    return text


def parity_table(suite: Suite) -> str:
    """The rows of path="reference" against the rows they are like, per task and seed; may be empty."""
    lines = [
        "| row | task | seed | loss, first 50 steps | score b - a, last epoch | best | differ |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    heading = len(lines)
    for row in suite.rows:
        if row.fields.get("path") != "reference" or row.like is None:
            continue
        for task in suite.tasks:
            rate = suite.chosen_rate(task, row)
            for seed in range(suite.seeds_of(row)):
                jobs = [Job(task, r, rate or 0.0, seed) for r in (suite.row(row.like), row)]
                folders = [job.folder(suite.output) for job in jobs]
                if not all((folder / "result.json").exists() for folder in folders):
                    continue
                c = compare(*map(read_result, folders))
                lines.append(
                    f"| {row.like} | {task} | {seed} | {c.loss_difference:.1e} | "
                    f"{c.score_difference:+.2f} | {c.best_difference:+.2f} | "
                    f"{c.differing} of {c.predictions} |"
                )
    return "\n".join(lines) if len(lines) > heading else ""


def runs_csv(suite: Suite) -> str:
    """Every finished run of the suite, the searched rates among them, one a line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in suite.rows:
        grid = row.rates or suite.row(row.like or "").rates
        for task in suite.tasks:
            chosen = suite.chosen_rate(task, row)
            for rate in grid:
                for seed in range(suite.seeds_of(row)):
                    folder = Job(task, row, rate, seed).folder(suite.output)
                    if not (folder / "result.json").exists():
                        continue
                    r = read_result(folder)
                    words = ["fastspec", "glue", *flags(suite.config(Job(task, row, rate, seed)))]
                    writer.writerow(
                        [task, row.name, f"{rate:g}", seed, int(rate == chosen)]
                        + [f"{r[which]['score']:.4f}" for which in ("best", "last")]
                        + [r["parameters"][part] for part in ("adapter", "head", "total")]
                        + [f"{r['step_ms']:.1f}", r["model"]["fingerprint"][:16], shlex.join(words)]
                    )
    return out.getvalue()


def draw(suite: Suite, path: Path) -> None:
    """Score against trainable parameters, one panel a task, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = cells(suite)
    tasks = [t for t in suite.tasks if any(t in by_task for by_task in found.values())]
    figure, panels = plt.subplots(
        1, len(tasks), figsize=(3.7 * len(tasks) + 0.8, 4.6), layout="constrained", squeeze=False
    )
    for axes, task in zip(panels[0], tasks, strict=True):
        for i, (name, by_task) in enumerate(found.items()):
            if task not in by_task:
                continue
            scores = by_task[task].best
            middle = statistics.median(scores.values())
            counts = by_task[task].result["parameters"]
            axes.errorbar(
                counts["adapter"] + counts["head"],
                middle,
                yerr=[[middle - min(scores.values())], [max(scores.values()) - middle]],
                fmt="osD^vP*X<>"[(i + i // 10) % 10],
                color=f"C{i % 10}",
                capsize=3,
                label=name,
            )
        axes.set(xscale="log", title=task, xlabel="trainable parameters, head included")
        axes.set_ylabel(f"{' and '.join(TASKS[task].metrics)} [points], best dev epoch")
        axes.grid(alpha=0.25)
    drawn: dict[str, Any] = {}
    for axes in panels[0]:
        handles, labels = axes.get_legend_handles_labels()
        drawn.update(zip(labels, handles, strict=True))
    figure.legend(
        list(drawn.values()), list(drawn), loc="outside lower center", ncols=min(4, len(drawn))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(suite: Suite, folder: Path) -> str:
    """Write table, CSV and picture of what is finished to `folder`; returns the table.

    Raises:
        ValueError: nothing is finished.
    """
    if not cells(suite):
        raise ValueError(f"no run of this suite is finished in {suite.output}")
    path = folder / TIMING
    times = None
    if path.exists():
        stored = json.loads(path.read_text("utf-8"))
        times = {name: StepTime(**fields) for name, fields in stored.items()}
    text = markdown(suite, times)
    write_atomically(folder / TABLE, (text + "\n").encode())
    write_atomically(folder / RUNS, runs_csv(suite).encode())
    draw(suite, folder / PICTURE)
    return text
