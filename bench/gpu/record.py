"""Rows of results in one JSON file, complete after every row, and the time that a step has left."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

from fastspec.files import write_json

RESULTS = "results.json"


def folder() -> Path:
    """Where results go; made where it is not there."""
    path = Path(os.environ.get("FASTSPEC_GPU_OUT", "build/gpu/out"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def read(path: Path | None = None) -> dict[str, Any]:
    """{"machine": ..., "steps": {step: {name of a row: figures}}} of a file; empty where there is none."""
    path = path or folder() / RESULTS
    empty: dict[str, Any] = {"machine": {}, "steps": {}}
    return json.loads(path.read_text()) if path.exists() else empty


def left() -> float:
    """Seconds until this step is ended from outside; an hour where nobody says."""
    until = os.environ.get("FASTSPEC_GPU_UNTIL")
    return float(until) - time.time() if until else 3600.0


class Record:
    """The rows of one step. Every row is on disk before the next is measured.

    `enough(seconds)` asks whether there is time for a measurement, and notes what was left out.
    """

    def __init__(self, step: str) -> None:
        self.step = step
        self.failures = 0
        with _editing() as data:
            data["machine"] |= harness.machine()
            data["steps"][step] = {}  # a step that is run again replaces what it found before

    def add(self, name: str, **figures: Any) -> None:
        """Keep a row under its name, and print it."""
        figures = {key: _plain(value) for key, value in figures.items()}
        with _editing() as data:
            data["steps"][self.step][name] = figures
        shown = ", ".join(f"{key} {_short(value)}" for key, value in figures.items())
        print(f"{name}: {shown}", flush=True)

    def about(self, **about: Any) -> None:
        """Add to what is known of the machine."""
        with _editing() as data:
            data["machine"] |= about

    def fail(self, name: str, error: object, **figures: Any) -> None:
        """Keep a failure as the row; the step goes on and ends with a non-zero status."""
        self.failures += 1
        self.add(name, error=str(error)[-1500:], **figures)

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[None]:
        """What goes wrong inside is this row's failure alone."""
        try:
            yield
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {error}")

    def enough(self, seconds: float, name: str) -> bool:
        """Whether `seconds` are left; where not, the row says that it was not reached."""
        if left() > seconds:
            return True
        self.add(name, skipped="no time left")
        return False

    def status(self) -> int:
        return 1 if self.failures else 0


def keep_choices(cache: Path) -> None:
    """Put what the library timed and chose, kind of call by kind, beside the rows."""
    with _editing() as data:
        for file in cache.glob("*.json"):
            data.setdefault("choices", {}).update(json.loads(file.read_text()))


@contextlib.contextmanager
def _editing() -> Iterator[dict[str, Any]]:
    """The results, to be changed inside; steps that run together take turns."""
    place = os.open(folder(), os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        data = read()
        yield data
        write_json(folder() / RESULTS, data)
    finally:
        os.close(place)


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity, and a result that is none must not lose the others."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + "}"
    return str(value)[:300]
