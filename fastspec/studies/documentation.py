"""The documentation in Python itself: text for studies that need no files and no network."""

from __future__ import annotations

import contextlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


def documentation() -> Iterator[tuple[str, str]]:
    """(where it stands, text): the topics of the language reference, then the standard library's
    docstrings file by file. The same Python gives the same texts in the same order."""
    with contextlib.suppress(ImportError):  # some distributions package it apart
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield f"topic {name}", topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        place = path.relative_to(library)
        if not _SKIP & set(place.parts):
            for text in _DOCSTRING.findall(path.read_text("utf-8", errors="ignore")):
                yield place.as_posix(), text
