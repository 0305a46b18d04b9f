"""`fastspec glue --suite`: the runs of a table, which of them are done, and which can be made next."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.record import (
    Run,
    add_to_record,
    check_alike,
    command_text,
    read_csv,
    read_folder,
)
from fastspec.studies.glue.result import DIVERGED, RESULT
from fastspec.studies.glue.table_rows import OTHER_TASKS, TASK_SIZES, Row, TaskSize


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a suite."""

    task: str
    row: Row
    rate: float
    seed: int

    def folder(self, output: Path) -> Path:
        name = "".join(c if c.isalnum() or c in ".-" else "-" for c in self.row.name)
        return output / self.task / name.replace("--", "-") / f"lr{self.rate:g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Suite:
    """A table's runs and where they are kept.

    Args:
        output: folder of all runs; those that are there already are not made again, whichever suite
            made them.
        rows: of the table.
        tasks: names of tasks.
        model, data: as in `GlueConfig`, for every run.
        seeds: an upper limit to the rows' and tasks' own numbers of seeds; None for none.
        sizes: of the tasks; those that are not in it have `OTHER_TASKS`.
        overrides: further fields of `GlueConfig` for every run.
        record: CSV file of runs made anywhere (`fastspec.studies.glue.record`); they are not made again.
    """

    output: Path
    rows: tuple[Row, ...]
    tasks: tuple[str, ...] = tuple(TASK_SIZES)
    model: str | None = None
    data: str | None = None
    seeds: int | None = None
    sizes: Mapping[str, TaskSize] = dataclasses.field(default_factory=lambda: TASK_SIZES)
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    record: Path | None = None

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        names = [row.name for row in self.rows]
        for row in self.rows:
            for other in (row.like, row.basis_of):
                if other is not None and other not in names:
                    raise ValueError(
                        f"row {row.name!r} needs the row {other!r}, which was left out"
                    )

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def size(self, task: str) -> TaskSize:
        return self.sizes.get(task, OTHER_TASKS)

    def seeds_of(self, task: str, row: Row) -> int:
        limits = (row.seeds, self.size(task).seeds, self.seeds)
        return min(n for n in limits if n is not None)

    def config(self, job: Job) -> GlueConfig:
        """The configuration of one run.

        Raises:
            ValueError: the rate of the run that gives its basis is not chosen yet.
        """
        size = self.size(job.task)
        fields: dict[str, Any] = {
            "task": job.task,
            "model": self.model,
            "data": self.data,
            "epochs": size.epochs,
            "batch_size": size.batch_size,
            "max_train_rows": size.max_train_rows,
            "train_pooler": True,
            **job.row.fields,
            **self.overrides,
            "lr": job.rate,
            "seed": job.seed,
        }
        if job.row.basis_of is not None:
            donor = self.needed(job)
            if donor is None:
                raise ValueError(f"no rate of {job.row.basis_of!r} is chosen on {job.task} yet")
            fields["basis_model"] = str(donor.folder(self.output))
        return GlueConfig(**fields)

    def needed(self, job: Job) -> Job | None:
        """The run whose folder this one needs: the one that gives its basis, or for the reference path
        the same run on the fused path. None if there is none, or its rate is not chosen yet."""
        if job.row.basis_of is not None:
            donor = self.row(job.row.basis_of)
            rate = self.chosen_rate(job.task, donor)
            return None if rate is None else Job(job.task, donor, rate, job.seed)
        if job.row.like is not None and job.row.fields.get("path") == "reference":
            return Job(job.task, self.row(job.row.like), job.rate, job.seed)
        return None

    def examples(self) -> dict[str, GlueConfig]:
        """One configuration of every row, by its name: for timing, which no rate, basis or seed changes."""
        return {
            row.name: self.config(
                Job(self.tasks[0], dataclasses.replace(row, basis_of=None), 1e-3, seed=0)
            )
            for row in self.rows
        }

    @cached_property
    def _recorded(self) -> dict[tuple[str, str], Run]:
        """The record's lines by row and command."""
        lines = read_csv(self.record) if self.record else []
        return {(run.row, run.command): run for run in lines}

    @cached_property
    def _found(self) -> dict[Job, Run]:
        return {}

    def find(self, job: Job) -> Run | None:
        """The run, if it has ended: from the record, or else from its folder.

        Raises:
            ValueError: it is of other rows or another pretrained model than the task's other runs.
        """
        if job not in self._found:
            run = self._look_up(job)
            if run is None:
                return None
            for other in self._found.values():
                if other.task == run.task:
                    check_alike(other, run)
            self._found[job] = run
        return self._found[job]

    def _look_up(self, job: Job) -> Run | None:
        needed = self.needed(job)
        if job.row.basis_of is not None and needed is None:
            return None
        command = command_text(self.config(job))
        if (job.row.name, command) in self._recorded:
            return self._recorded[job.row.name, command]
        fused = None
        if job.row.basis_of is None and needed is not None:
            fused = needed.folder(self.output)
            if not (fused / RESULT).exists():
                return None  # nothing to compare it with yet
        run = read_folder(job.folder(self.output), job.row.name, fused)
        # of another command: `fastspec glue` will refuse its folder and say why
        return run if run is not None and run.command == command else None

    def runs(self, task: str, row: Row) -> list[Run]:
        """The ended runs of one row on one task, searched rates among them."""
        jobs = [
            Job(task, row, r, s) for r in self.grid(row) for s in range(self.seeds_of(task, row))
        ]
        return [run for job in jobs if (run := self.find(job)) is not None]

    def all_runs(self) -> list[Run]:
        return [run for row in self.rows for task in self.tasks for run in self.runs(task, row)]

    def grid(self, row: Row) -> tuple[float, ...]:
        return row.rates or self.row(row.like or "").rates

    def save_record(self) -> None:
        """Add to the record what is not in it."""
        if self.record:
            add_to_record(self.record, self.all_runs())

    def stale(self) -> list[Run]:
        """The record's lines of this suite's rows and tasks that it would make by another command."""
        names = {row.name for row in self.rows}
        today = {
            (row.name, command_text(self.config(job)))
            for row in self.rows
            for task in self.tasks
            for rate in self.grid(row)
            for seed in range(row.seeds)
            if self.needed(job := Job(task, row, rate, seed)) or row.basis_of is None
        }
        return [
            run
            for key, run in self._recorded.items()
            if run.row in names and run.task in self.tasks and key not in today
        ]

    def chosen_rate(self, task: str, row: Row) -> float | None:
        """The rate of the best score on the first seed, the lower of equals; None before all are run, and
        where all diverged."""
        if row.like is not None:
            return self.chosen_rate(task, self.row(row.like))
        tried = [self.find(Job(task, row, rate, 0)) for rate in sorted(row.rates)]
        if None in tried:
            return None
        scores = {run.rate: run.best for run in tried if run is not None and run.best is not None}
        return max(scores, key=scores.__getitem__) if scores else None

    def skipped(self) -> list[str]:
        """Which rows have no chosen rate, and never will, because every rate diverged; one line each."""
        lines = []
        for task in self.tasks:
            for row in self.rows:
                other = row.like or row.basis_of
                if row.rates and self._all_diverged(task, row):
                    lines.append(f"{task}, {row.name}: every rate diverged.")
                elif other is not None and self._all_diverged(task, self.row(other)):
                    lines.append(
                        f"{task}, {row.name}: skipped, since every rate of {other!r} diverged."
                    )
        return lines

    def _all_diverged(self, task: str, row: Row) -> bool:
        if row.like is not None:
            return self._all_diverged(task, self.row(row.like))
        runs = [self.find(Job(task, row, rate, 0)) for rate in row.rates]
        return all(run is not None and run.diverged for run in runs)

    def ready(self) -> Iterator[Job]:
        """Runs that are not done and wait for no other, the search first."""
        for first_seed in (True, False):
            for row in self.rows:
                for task in self.tasks:
                    yield from (j for j in self._wanted(task, row) if (j.seed == 0) == first_seed)

    def _wanted(self, task: str, row: Row) -> Iterator[Job]:
        chosen = self.chosen_rate(task, row)
        jobs = [Job(task, row, rate, 0) for rate in row.rates]
        if chosen is not None:
            jobs += [Job(task, row, chosen, seed) for seed in range(self.seeds_of(task, row))]
        for job in dict.fromkeys(jobs):
            if self.find(job) is not None:
                continue
            needed = self.needed(job)
            if needed is None:
                if row.basis_of is None:
                    yield job
            elif (needed.folder(self.output) / RESULT).exists():
                yield job
            elif not self._diverged(needed):
                yield needed  # again, where only the record has it

    def _diverged(self, job: Job) -> bool:
        run = self.find(job)
        return (job.folder(self.output) / DIVERGED).exists() or (run is not None and run.diverged)
