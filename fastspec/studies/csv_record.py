"""A record of runs: one CSV line each, of a dataclass whose fields are text, whole or real numbers."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_lines(path: Path, kind: type[T]) -> list[T]:
    """The lines of a record as `kind`, a dataclass; none if there is no such file. Other columns are
    passed over.

    Raises:
        ValueError: a column is missing or a value is none of its kind; the message names the line.
    """
    if not path.exists():
        return []
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [f.name for f in fields if f.name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} is no record of runs: it has no column {missing[0]!r}")
        return [kind(**{f.name: _value(path, reader, line, f) for f in fields}) for line in reader]


def _value(path: Path, reader: Any, line: dict[str, str], field: dataclasses.Field) -> Any:
    kind, _, optional = str(field.type).partition(" | ")
    text = line[field.name]
    if optional and text == "":
        return None
    try:
        return {"str": str, "int": int, "float": float}[kind](text)
    except (ValueError, TypeError):
        raise ValueError(
            f"{path}:{reader.line_num}: column {field.name!r} holds {text!r}, expected {kind}"
        ) from None
