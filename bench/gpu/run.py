"""Runs the steps, each in a process of its own under a time limit, and prints what came of them.

A step that fails, hangs or crashes costs its own rows only. Steps that measure no time run together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from gpu import record

LIMIT = 570.0  # seconds of the whole, below the ten minutes of one command
PATIENCE = 6.0  # times as long in a rehearsal, where only a hang is of interest
GRACE = 5.0  # seconds between what a step is told of its time and its end


@dataclasses.dataclass(frozen=True)
class Step:
    """One process: its name, its seconds, and the module that it runs (or any command)."""

    name: str
    seconds: float
    command: tuple[str, ...] = ()
    needs: str | None = "versions"  # which step must not have failed in this run
    always: bool = False  # also where only others are asked for
    extra: bool = False  # only where it is asked for

    @property
    def argv(self) -> list[str]:
        return list(self.command) or [sys.executable, "-m", f"gpu.{self.name}"]


# what stands on one line runs together
PHASES: tuple[tuple[Step, ...], ...] = (
    (Step("versions", 15, needs=None),),
    # without it every process would compile for itself
    (Step("build", 90, always=True),),
    (Step("correctness", 90), Step("sanitizer", 90), Step("glue", 90)),
    (Step("tune", 90, extra=True),),
    (Step("layers", 75),),
    (Step("steps", 130),),
    (Step("tasks", 40),),
    (Step("compiled", 80),),
    (Step("svd", 45),),
    (Step("profile", 60),),
)


def rehearsing() -> bool:
    return os.environ.get("FASTSPEC_GPU_REHEARSE") == "1"


class Log:
    """run.log and the terminal, line by line; several steps may write at once."""

    def __init__(self) -> None:
        self.file = (record.folder() / "run.log").open("a")
        self.lock = threading.Lock()

    def line(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)
            print(text, file=self.file, flush=True)


def run_step(step: Step, ends: float, log: Log, alone: bool = True) -> str:
    """What became of a step: "ok", "failed (status)", "over time"; ends it at `ends`."""
    seconds = min(step.seconds * (PATIENCE if rehearsing() else 1), ends - time.time())
    if seconds < 2 * GRACE:
        return "skipped: no time left"
    started = time.time()
    environment = {**os.environ, "FASTSPEC_GPU_UNTIL": str(started + seconds - GRACE)}
    if not alone:  # candidates timed beside others must not be what later steps choose
        environment["FASTSPEC_CACHE"] += f"-{step.name}"
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    process = subprocess.Popen(
        step.argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # so that its own processes end with it
    )
    assert process.stdout is not None
    timer = threading.Timer(seconds, end, [process])
    timer.start()
    for line in process.stdout:
        log.line(f"[{step.name}] {line.rstrip()}")
    status = process.wait()
    over = not timer.is_alive()
    timer.cancel()
    end(process)  # what it left running
    taken = f"{time.time() - started:.0f} s"
    if over:
        return f"over time, {taken}"
    return f"ok, {taken}" if status == 0 else f"failed ({status}), {taken}"


def end(process: subprocess.Popen) -> None:
    """End a step and the processes it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def environment() -> None:
    """Caches of this run alone: what an earlier version of the kernels chose must not count."""
    scratch = Path(tempfile.mkdtemp(prefix="fastspec-gpu-"))
    os.environ.setdefault("FASTSPEC_CACHE", str(scratch / "choices"))
    # compiled kernels are keyed by their sources: a second call on one machine may have them
    shared = Path(tempfile.gettempdir()) / "fastspec-gpu-compiled"
    os.environ.setdefault("TRITON_CACHE_DIR", str(shared / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(shared / "inductor"))
    glue = Path("build/gpu/glue")
    if glue.is_dir():
        os.environ.setdefault("FASTSPEC_GLUE_DIR", str(glue.resolve()))
    if rehearsing():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def main(names: Sequence[str], phases: Sequence[Sequence[Step]] = PHASES) -> int:
    known = [step.name for phase in phases for step in phase]
    wanted = {name: seconds for name, _, seconds in (n.partition("=") for n in names)}
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        print(f"no step {unknown[0]!r}; the steps are: {' '.join(known)}", file=sys.stderr)
        return 2
    environment()
    log = Log()
    ends = time.time() + LIMIT * (PATIENCE if rehearsing() else 1)
    outcome: dict[str, str] = {}

    def run(step: Step, alone: bool) -> None:
        if step.needs in outcome and not outcome[step.needs].startswith("ok"):
            outcome[step.name] = f"skipped: {step.needs} failed"
        else:
            outcome[step.name] = run_step(step, ends, log, alone)
        log.line(f"== {step.name}: {outcome[step.name]}")
        if step.name == "build" and not outcome[step.name].startswith("ok"):
            os.environ["FASTSPEC_NO_EXT"] = "1"

    if rehearsing() and len(phases) > 2:
        phases = [*phases[:2], [step for phase in phases[2:] for step in phase]]  # no time counts
    for phase in phases:
        chosen = [
            dataclasses.replace(s, seconds=float(wanted.get(s.name) or s.seconds))
            for s in phase
            if s.name in wanted or (not wanted and not s.extra) or s.always
        ]
        threads = [threading.Thread(target=run, args=[step, len(chosen) == 1]) for step in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    record.keep_choices(Path(os.environ["FASTSPEC_CACHE"]))
    log.line(summary(outcome))
    return 0 if all(result.startswith("ok") for result in outcome.values()) else 1


def summary(outcome: dict[str, str]) -> str:
    """The bars, and last a table of the steps: the end of the output is what is sure to be seen."""
    from gpu import tables

    found = record.read()["steps"]
    lines = [
        "",
        tables.bar_table(found, measured_only=True),
        "",
        "| step | outcome | rows | of them failed |",
        "|---|---|---:|---:|",
    ]
    for name, result in outcome.items():
        rows = found.get(name, {})
        failed = sum("error" in row for row in rows.values())
        lines.append(f"| {name} | {result} | {len(rows)} | {failed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
