"""What a suite's runs say: a Markdown table, one CSV line a run, and a picture."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastspec.files import write_atomically, write_json
from fastspec.studies.glue.record import Run, to_csv
from fastspec.studies.glue.result import RESULT, read_json
from fastspec.studies.glue.suite import Job, Suite
from fastspec.studies.glue.table_rows import Row
from fastspec.studies.glue.tasks import TASKS
from fastspec.studies.glue.timing import FLOOR, StepTime

Cosines = Mapping[str, float]  # by kind of matrix
Measure = Callable[[Path], Mapping[str, Any]]  # of a finished run's folder
TABLE, RUNS, PICTURE, TIMING = "table.md", "runs.csv", "scores.png", "timing.json"


@dataclasses.dataclass(frozen=True)
class Cell:
    """The finished runs of one row on one task, at one rate.

    Args:
        rate: of all of them: the row's choice, or while its search is unfinished the best so far.
        searched: how many rates of the row's grid were tried, and how many it has.
        runs: by seed.
    """

    rate: float
    searched: tuple[int, int]
    runs: dict[int, Run]

    def scores(self, which: str) -> dict[int, float]:
        """By seed, in points, of the "best" or of the "last" dev epoch."""
        return {seed: getattr(run, which) for seed, run in self.runs.items()}

    @property
    def first(self) -> Run:
        """For what does not depend on the seed."""
        return self.runs[min(self.runs)]


def cell(suite: Suite, task: str, row: Row) -> Cell | None:
    """What is finished of one row on one task; None if nothing is."""
    ended = suite.runs(task, row)
    finished = {(run.rate, run.seed): run for run in ended if run.best is not None}
    if not finished:
        return None
    first = min(seed for _, seed in finished)
    scores = {r: run.best or 0.0 for (r, seed), run in sorted(finished.items()) if seed == first}
    rate = max(scores, key=scores.__getitem__)
    tried = sum(run.seed == 0 for run in ended)
    ours = {seed: run for (r, seed), run in finished.items() if r == rate}
    return Cell(rate, (tried, len(row.rates)) if row.rates else (0, 0), ours)


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


def all_subspace_cosines(suite: Suite, measure: Measure) -> dict[str, dict[str, Cosines]]:
    """`subspace_cosines` by row and task, of the seed-0 runs of full finetuning whose folders are there."""
    found: dict[str, dict[str, Cosines]] = {}
    for name, by_task in cells(suite).items():
        row = suite.row(name)
        for task, c in by_task.items():
            folder = Job(task, row, c.rate, 0).folder(suite.output)
            if row.fields.get("method") == "full" and (folder / RESULT).exists():
                found.setdefault(name, {})[task] = subspace_cosines(folder, measure)
    return found


def subspace_cosines(folder: Path, measure: Measure) -> Cosines:
    """How far a finished run left the leading vectors where they were, attention and MLP apart: root mean
    square cosine between the spans of the leading tenth before and after. Kept beside the result."""
    path = folder / "stability.json"
    if not path.exists():
        line = measure(folder)
        found = {kind: line[f"{kind}: subspace, leading tenth"] for kind in ("attention", "mlp")}
        write_json(path, {kind: value for kind, value in found.items() if value != ""})
    return read_json(path)


def markdown(
    suite: Suite,
    times: Mapping[str, StepTime] | None = None,
    cosines: Mapping[str, Mapping[str, Cosines]] | None = None,
) -> str:
    """The table, with step times and `all_subspace_cosines` where they are given."""
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
    header += ["stability"] if cosines is not None else []
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in suite.rows:
        by_task = found.get(row.name)
        if by_task is None:
            continue
        line = [row.name, *_shares(next(iter(by_task.values())).first)]
        line += [
            spread(by_task[t].scores("best"), suite.seeds_of(t, row)) if t in by_task else ""
            for t in suite.tasks
        ]
        line += [_mean(by_task, suite.tasks, "best"), _mean(by_task, suite.tasks, "last")]
        line.append(", ".join(_rate(by_task[t]) if t in by_task else "-" for t in suite.tasks))
        if times:
            time = times.get(row.name)
            line += [f"{time.ratio:.2f}", f"{time.saved:.2f}"] if time else ["", ""]
        if cosines is not None:
            ours = cosines.get(row.name, {})
            line.append(", ".join(_both_kinds(ours[t]) if t in ours else "-" for t in suite.tasks))
        rows.append(line)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", _caption(found, times, cosines is not None)]
    for skipped in suite.skipped():
        lines += ["", skipped]
    parity = parity_table(suite)
    if parity:
        lines += ["", "Fused path (a) and reference path (b), the same seed:", "", parity]
    return "\n".join(lines)


def _shares(run: Run) -> list[str]:
    """Trained parameters without and with the head, and their shares of all."""
    assert run.adapter is not None
    assert run.head is not None
    assert run.total is not None
    return [f"{n:,} ({100 * n / run.total:.3f} %)" for n in (run.adapter, run.adapter + run.head)]


def _mean(by_task: Mapping[str, Cell], tasks: tuple[str, ...], which: str) -> str:
    if any(task not in by_task for task in tasks):
        return ""
    medians = [statistics.median(by_task[t].scores(which).values()) for t in tasks]
    return f"{statistics.mean(medians):.1f}"


def _rate(cell: Cell) -> str:
    tried, of = cell.searched
    return f"{cell.rate:g}" + (f" ({tried} of {of} tried)" if tried < of else "")


def _both_kinds(cosines: Cosines) -> str:
    return " / ".join(
        f"{cosines[kind]:.3f}" if kind in cosines else "-" for kind in ("attention", "mlp")
    )


def _caption(
    found: Mapping[str, Mapping[str, Cell]],
    times: Mapping[str, StepTime] | None,
    with_cosines: bool,
) -> str:
    first: dict[str, Run] = {}
    for by_task in found.values():
        for task, c in by_task.items():
            first.setdefault(task, c.first)
    sizes = [
        f"{task} {run.rows:,} rows, {run.epochs} epochs of batches of {run.batch_size}"
        for task, run in first.items()
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
    if with_cosines:
        text += (
            " Stability, by task: cosine between the spans of the leading tenth of the singular vectors "
            "before and after training, attention / MLP, seed 0; - where the run's folder is not there."
        )
    return text


def parity_table(suite: Suite) -> str:
    """The rows of path="reference" against the rows they are like, per task and seed; may be empty."""
    lines = [
        "| row | task | seed | loss, first 50 steps | score b - a, last epoch | best | differ |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    heading = len(lines)
    for run in suite.all_runs():
        if run.loss_difference is not None:
            lines.append(
                f"| {suite.row(run.row).like} | {run.task} | {run.seed} | {run.loss_difference:.1e} | "
                f"{run.score_difference:+.2f} | {run.best_difference:+.2f} | "
                f"{run.differing} of {run.predictions} |"
            )
    return "\n".join(lines) if len(lines) > heading else ""


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
            scores = by_task[task].scores("best")
            middle = statistics.median(scores.values())
            run = by_task[task].first
            axes.errorbar(
                (run.adapter or 0) + (run.head or 0),
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


def write_report(suite: Suite, folder: Path, measure: Measure | None = None) -> str:
    """Write table, CSV and picture of what is finished to `folder`; returns the table.

    Args:
        suite: whose runs.
        folder: for the three files.
        measure: tells how far a run of full finetuning moved the singular vectors; seconds for each.

    Raises:
        ValueError: nothing is finished.
    """
    if not cells(suite):
        where = f"{suite.output} or {suite.record}" if suite.record else suite.output
        raise ValueError(f"no run of this suite is finished in {where}")
    path = folder / TIMING
    times = None
    if path.exists():
        stored = read_json(path)
        times = {name: StepTime(**fields) for name, fields in stored.items()}
    text = markdown(suite, times, None if measure is None else all_subspace_cosines(suite, measure))
    write_atomically(folder / TABLE, (text + "\n").encode())
    write_atomically(folder / RUNS, to_csv(suite.all_runs()).encode())
    suite.save_record()
    draw(suite, folder / PICTURE)
    return text
