"""`fastspec glue --suite`: every run of a table, several at a time, each in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from fastspec.glue.config import GlueConfig
from fastspec.glue.record import DIVERGED, RESULT, read_json, read_result
from fastspec.glue.rows import OTHER_TASKS, SUITES, TASK_SIZES, Row


class SuiteError(ChildProcessError):
    """A run of a suite failed for another reason than divergence; the message holds its last output."""


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
        seeds: a lower limit to the rows' own numbers of seeds; None for none.
        overrides: further fields of `GlueConfig` for every run.
    """

    output: Path
    rows: tuple[Row, ...]
    tasks: tuple[str, ...] = tuple(TASK_SIZES)
    model: str | None = None
    data: str | None = None
    seeds: int | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        for row in self.rows:
            for other in (row.like, row.basis_of):
                if other is not None and other not in names:
                    raise ValueError(
                        f"row {row.name!r} needs the row {other!r}, which was left out"
                    )

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def seeds_of(self, row: Row) -> int:
        return row.seeds if self.seeds is None else min(row.seeds, self.seeds)

    def config(self, job: Job) -> GlueConfig:
        """The configuration of one run."""
        size = TASK_SIZES.get(job.task, OTHER_TASKS)
        fields: dict[str, Any] = {
            "task": job.task,
            "model": self.model,
            "data": self.data,
            **dataclasses.asdict(size),
            "train_pooler": True,
            **job.row.fields,
            **self.overrides,
            "lr": job.rate,
            "seed": job.seed,
        }
        if job.row.basis_of is not None:
            donor = self.row(job.row.basis_of)
            rate = self.chosen_rate(job.task, donor)
            assert rate is not None
            folder = Job(job.task, donor, rate, job.seed).folder(self.output)
            fields["basis_model"] = str(folder)
        return GlueConfig(**fields)

    def examples(self) -> dict[str, GlueConfig]:
        """One configuration of every row, by its name: for timing, which no rate, basis or seed changes."""
        return {
            row.name: self.config(
                Job(self.tasks[0], dataclasses.replace(row, basis_of=None), 1e-3, seed=0)
            )
            for row in self.rows
        }

    def score(self, job: Job) -> float | None:
        """Best dev epoch's score in points; minus infinity where it diverged, None if not run yet."""
        folder = job.folder(self.output)
        if (folder / RESULT).exists():
            return read_result(folder)["best"]["score"]
        return float("-inf") if (folder / DIVERGED).exists() else None

    def chosen_rate(self, task: str, row: Row) -> float | None:
        """The rate of the best score on the first seed, the lower of equals; None before all are run."""
        if row.like is not None:
            return self.chosen_rate(task, self.row(row.like))
        scores = {rate: self.score(Job(task, row, rate, 0)) for rate in sorted(row.rates)}
        found = {rate: score for rate, score in scores.items() if score is not None}
        if len(found) < len(scores):
            return None
        return max(found, key=found.__getitem__)

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
            jobs += [Job(task, row, chosen, seed) for seed in range(self.seeds_of(row))]
        for job in dict.fromkeys(jobs):
            if self.score(job) is None and self._basis_is_there(job):
                yield job

    def _basis_is_there(self, job: Job) -> bool:
        if job.row.basis_of is None:
            return True
        donor = self.row(job.row.basis_of)
        rate = self.chosen_rate(job.task, donor)
        return rate is not None and self.score(Job(job.task, donor, rate, job.seed)) is not None


def choose(suite: str, names: Sequence[str] | None = None) -> tuple[Row, ...]:
    """The rows of a named suite, or those of them named, with the rows that these need."""
    rows = SUITES[suite]
    if names is None:
        return rows
    known = {row.name: row for row in rows}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"--rows: suite {suite} has no row {unknown[0]!r}, only {', '.join(known)}"
        )
    wanted = set(names)
    for row in reversed(rows):
        if row.name in wanted:
            wanted.update(name for name in (row.like, row.basis_of) if name)
    return tuple(row for row in rows if row.name in wanted)


def make(suite: Suite, jobs: int, threads: int, report: Callable[[str], None] = print) -> None:
    """Make every run that is missing, `jobs` at a time with `threads` torch threads each.

    Interrupted, it can be started again: whole runs are kept, the others go on from a checkpoint.

    Raises:
        SuiteError: a run failed, other than by divergence. The others under way are stopped.
    """
    began = time.perf_counter()
    running: dict[Future[str], Job] = {}
    processes: list[subprocess.Popen] = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                busy = set(running.values())
                for job in suite.ready():
                    if len(running) < jobs and job not in busy:
                        running[pool.submit(_make, suite, job, threads, processes)] = job
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    minutes = (time.perf_counter() - began) / 60
                    report(
                        f"{minutes:6.1f} min  {job.task} {job.row.name}, rate {job.rate:g}, "
                        f"seed {job.seed}: {future.result()}"
                    )
        except BaseException:
            for process in processes:
                process.terminate()
            raise


def _make(suite: Suite, job: Job, threads: int, processes: list[subprocess.Popen]) -> str:
    """Make one run in a process of its own; returns what to say of it."""
    folder = job.folder(suite.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    log = folder.with_name(folder.name + ".log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(suite.config(job), folder, threads),
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        processes.append(process)
        process.wait()
    score = suite.score(job)
    if score is None:
        tail = log.read_text("utf-8", errors="replace")[-2000:]
        raise SuiteError(f"{folder} failed with status {process.returncode}:\n{tail}")
    if (folder / DIVERGED).exists():
        return read_json(folder / DIVERGED)["error"]
    return f"best dev epoch {score:.2f}"


def command(config: GlueConfig, folder: Path, threads: int) -> list[str]:
    """The command line that makes one run."""
    words = [sys.executable, "-m", "fastspec", "glue", "--output", str(folder)]
    words += ["--threads", str(threads)]
    return words + flags(config)


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
