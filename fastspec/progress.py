"""How far a long run is: a bar that redraws on a terminal, a line a minute elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Literal, TextIO

Level = Literal["quiet", "normal", "verbose"]
MINUTE = 60.0

_level: Level = "normal"


def level() -> Level:
    """What the command shows: results alone; how far it is too; also what other libraries say."""
    return _level


@contextlib.contextmanager
def shown(wanted: Level) -> Iterator[None]:
    """Inside, commands show so much."""
    global _level
    before, _level = _level, wanted
    try:
        yield
    finally:
        _level = before


def bar(total: int | None, description: str, unit: str, delay: float = 0, **options: Any) -> Any:
    """A bar of tqdm on stderr.

    Args:
        total: how much there is to do.
        description, unit: what is done, and what is counted.
        delay: seconds before it appears.
        options: further ones of tqdm.
    """
    from tqdm import tqdm

    options = {"total": total, "desc": description, "unit": unit, **options}
    if sys.stderr.isatty():
        return tqdm(file=sys.stderr, delay=delay, disable=_level == "quiet", **options)
    options |= {"mininterval": MINUTE, "maxinterval": MINUTE, "delay": MINUTE, "leave": False}
    return tqdm(file=_Lines(sys.stderr), disable=_level == "quiet", ascii=True, **options)


class _Lines:
    """A stream that gets lines where tqdm goes back to the start of one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()
