"""Builds the compiled parts where it can (fastspec/_build.py); all else stands in pyproject.toml.

The library works without them. `FASTSPEC_NO_EXT=1` skips them; a missing torch (in an isolated build) or a
failing compiler skips them too, and the reason is left in `fastspec/_build.txt` for `fastspec.backends()`.
What is not built now is built at first use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
NOTES = ROOT / "fastspec" / "_build.txt"

_spec = importlib.util.spec_from_file_location("_fastspec_build", ROOT / "fastspec" / "_build.py")
assert _spec
assert _spec.loader
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)


def note(part: str, reason: str) -> None:
    """Keep for `fastspec.backends()` why `part` is not there: one line each."""
    with NOTES.open("a") as notes:
        notes.write(f"{part}: {' '.join(reason.split())}\n")
    print(f"fastspec: no {part}: {reason}", file=sys.stderr)


def sources(suffix: str) -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob(f"*{suffix}"))


def copy_notes(command: Any) -> None:
    if NOTES.exists() and not command.inplace:  # the package's files were copied before this
        command.copy_file(str(NOTES), os.path.join(command.build_lib, "fastspec"))


def extensions() -> dict[str, Any]:
    """The `setup` arguments of the compiled parts, or none and notes that say why."""
    NOTES.unlink(missing_ok=True)
    if os.environ.get("FASTSPEC_NO_EXT") == "1":
        for part in _build.PARTS:
            note(part, "skipped at installation by FASTSPEC_NO_EXT=1")
        return {}
    found = []
    for part in _build.PARTS:
        try:
            found.append(_build.extension(part, sources(_build.SUFFIXES[part])))
        except ImportError as e:
            note(part, f"torch was not there at installation ({e})")
        except _build.CannotBuildError as e:
            note(part, str(e))
    if not found:
        return {}
    return {
        "ext_modules": found,
        "cmdclass": {"build_ext": _build.build_command(note, copy_notes)},
    }


if __name__ == "__main__":
    setup(**extensions())
