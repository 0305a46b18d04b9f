"""Make the runs of a suite, several at a time, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.record import flags
from fastspec.studies.glue.result import DIVERGED, RESULT, read_json
from fastspec.studies.glue.suite import Job, Suite


class SuiteError(ChildProcessError):
    """A run of a suite failed for another reason than divergence; the message holds its last output."""


class Processes:
    """Processes that threads wait for, and that end together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: list[subprocess.Popen] = []
        self._ended = False

    def run(self, words: list[str], **options: Any) -> int:
        """Wait for a process; returns its exit status. After `end` none starts: SIGTERM's status."""
        with self._lock:
            if self._ended:
                return -signal.SIGTERM
            process = subprocess.Popen(words, **options)
            self._started.append(process)
        return process.wait()

    def end(self) -> None:
        """Terminate those that run, and start no other."""
        with self._lock:
            self._ended = True
            for process in self._started:
                process.terminate()


def make(suite: Suite, jobs: int, threads: int, announce: Callable[[str], None] = print) -> None:
    """Make every run that is missing, `jobs` at a time with `threads` torch threads each.

    Interrupted, it can be started again: whole runs are kept, the others go on from a checkpoint.

    Raises:
        SuiteError: a run failed, other than by divergence. The others under way are stopped.
    """
    began = time.perf_counter()
    running: dict[Future[int], Job] = {}
    processes = Processes()
    suite.save_record()
    with _ended_by_sigterm(), ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                for job in suite.ready():
                    if len(running) < jobs and job not in running.values():
                        running[pool.submit(_make, suite, job, threads, processes)] = job
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    outcome = _outcome(suite, job, future.result())
                    minutes = (time.perf_counter() - began) / 60
                    announce(
                        f"{minutes:6.1f} min  {job.task} {job.row.name}, rate {job.rate:g}, "
                        f"seed {job.seed}: {outcome}"
                    )
                    suite.save_record()
        except BaseException:
            processes.end()
            raise


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises in the main thread, as Ctrl-C does, so that no run outlives its suite."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _make(suite: Suite, job: Job, threads: int, processes: Processes) -> int:
    """Make one run in a process of its own; returns its exit status."""
    folder = job.folder(suite.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with _log(folder).open("w") as stream:
        words = command(suite.config(job), folder, threads)
        return processes.run(words, stdout=stream, stderr=subprocess.STDOUT, env=environment)


def _outcome(suite: Suite, job: Job, status: int) -> str:
    """What to say of a run that was made."""
    run = suite.find(job)
    folder = job.folder(suite.output)
    # the record may have a run whose folder is made again
    ended = any((folder / name).exists() for name in (RESULT, DIVERGED))
    if run is None or not ended:
        tail = _log(folder).read_text("utf-8", errors="replace")[-2000:]
        raise SuiteError(f"{folder} failed with status {status}:\n{tail}")
    if run.best is None:
        return read_json(folder / DIVERGED)["error"]
    return f"best dev epoch {run.best:.2f}"


def _log(folder: Path) -> Path:
    return folder.with_name(folder.name + ".log")


def command(config: GlueConfig, folder: Path, threads: int) -> list[str]:
    """The command line that makes one run."""
    words = [sys.executable, "-m", "fastspec", "glue", "--output", str(folder)]
    words += ["--threads", str(threads)]
    return words + flags(config)
