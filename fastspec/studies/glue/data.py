"""Where the rows come from: a folder of files, the hub, or sentences that Python brings along.

Files are tab separated with one header line, UTF-8, without quoting. Every complaint about a row
names the file, the line (counted from 1, the header being line 1) and the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

from fastspec.studies.glue.sentences import sentences, swap_rows
from fastspec.studies.glue.tasks import EMBEDDED, TASKS, Task

HUB = "nyu-mll/glue"
ENVIRONMENT = "FASTSPEC_GLUE_DIR"


class DataError(ValueError):
    """A row or file that can't be used; the message names file, line and reason."""

    def __init__(self, where: str | Path, line: int | None, reason: str) -> None:
        super().__init__(f"{where}:{line}: {reason}" if line is not None else f"{where}: {reason}")


@dataclasses.dataclass
class Split:
    """Rows in file order, one or two strings each; `labels` is None where there are none."""

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float] | None
    sha256: str

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, rows: int | None) -> Split:
        """The first `rows` rows (all for None)."""
        if rows is None or rows >= len(self):
            return self
        labels = None if self.labels is None else self.labels[:rows]
        return dataclasses.replace(self, texts=self.texts[:rows], labels=labels)

    def take(self, rows: Sequence[int]) -> Split:
        """These rows, in this order."""
        labels = None if self.labels is None else [self.labels[i] for i in rows]
        return dataclasses.replace(self, texts=[self.texts[i] for i in rows], labels=labels)

    def permuted(self, seed: int) -> Split:
        """The same texts with the labels of other rows: nothing to learn but the rows by heart."""
        labels = list(self.labels or [])
        random.Random(seed).shuffle(labels)
        return dataclasses.replace(self, labels=labels)


@dataclasses.dataclass
class Source:
    """A task's data and where it was found.

    Args:
        kind: "folder", "hub" or "embedded".
        where: the folder, the hub name, or what the sentences were taken from.
        task: the task these rows belong to (the embedded one when nothing else was found).
        train, dev, test: the splits; `test` holds unlabelled ones.
    """

    kind: str
    where: str
    task: Task
    train: Split
    dev: dict[str, Split]
    test: dict[str, Split]

    def describe(self) -> str:
        dev = ", ".join(f"{name} {len(split):,}" for name, split in self.dev.items())
        return f"{self.task.name} from {self.where} ({self.kind}): train {len(self.train):,}, {dev}"

    def to_dict(self) -> dict[str, Any]:
        splits = {"train": self.train, **self.dev, **self.test}
        return {
            "kind": self.kind,
            "where": self.where,
            "task": self.task.name,
            "rows": {name: len(split) for name, split in splits.items()},
            "sha256": {name: split.sha256 for name, split in splits.items()},
        }


def load(task: Task, data: str | os.PathLike | None = None) -> Source:
    """The rows of `task`.

    Taken from `data`, else from the folder in FASTSPEC_GLUE_DIR, else from the hub, else the
    embedded task takes its place. A folder that was named is never passed over: what is missing
    there is an error.

    Raises:
        FileNotFoundError: a named folder lacks the task or one of its splits.
        DataError: a malformed row or an unknown label.
    """
    if task is EMBEDDED:
        return embedded()
    folder = data or os.environ.get(ENVIRONMENT)
    if folder:
        origin = "--data" if data else ENVIRONMENT
        return from_folder(task, Path(folder), origin)
    source = from_hub(task)
    return source if source is not None else embedded()


def is_local(task: Task, data: str | os.PathLike | None) -> bool:
    """Whether `load` will need no network."""
    return task is EMBEDDED or bool(data or os.environ.get(ENVIRONMENT)) or not hub_reachable()


def from_folder(task: Task, root: Path, origin: str = "data") -> Source:
    """A task from `root`/<task>/<split>.tsv; case and hyphens of folder names don't matter."""
    if not root.is_dir():
        raise FileNotFoundError(f"{origin}: no such folder: {root}")
    trained = TASKS[task.trains_on] if task.trains_on else task
    folder = _task_folder(trained, root, origin)
    dev = {name: read_tsv(_split_file(folder, names), task) for name, names in trained.dev.items()}
    train = read_tsv(_split_file(folder, ("train",)), task)
    test = {}
    if task.test:
        own = _task_folder(task, root, origin)
        test = {
            name: read_tsv(_split_file(own, names), task, labelled=False)
            for name, names in task.test.items()
        }
    return Source("folder", str(root.resolve()), task, train, dev, test)


def _task_folder(task: Task, root: Path, origin: str) -> Path:
    wanted = {_plain(task.folder), _plain(task.name)}
    for path in sorted(root.iterdir()):
        if path.is_dir() and _plain(path.name) in wanted:
            return path
    there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
    raise FileNotFoundError(
        f"{origin}: {root} has no folder {task.folder!r} (it has {there}); add it, name another "
        f"folder with --data, or unset {ENVIRONMENT} to use the hub"
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _split_file(folder: Path, names: Iterable[str]) -> Path:
    names = tuple(names)
    for name in names:
        path = folder / f"{name}.tsv"
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder / names[0]}.tsv: no such file")


def read_tsv(path: Path, task: Task, labelled: bool = True) -> Split:
    """One file of `task`. Without `labelled` a label column may be absent and is not looked at."""
    raw = path.read_bytes()
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise DataError(path, 1, "the file is empty, expected a header line")
    header = _cells(path, 1, lines[0])
    columns = _text_columns(path, header, task)
    where = [header.index(c) for c in columns]
    if labelled and "label" not in header:
        raise DataError(path, 1, f"no column 'label' in the header {header}")
    at = header.index("label") if labelled else None
    texts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    for number, line in enumerate(lines[1:], start=2):
        cells = _cells(path, number, line)
        if len(cells) != len(header):
            raise DataError(
                path,
                number,
                f"expected {len(header)} cells ({', '.join(header)}), got {len(cells)}",
            )
        texts.append(tuple(cells[i] for i in where))
        if at is not None:
            labels.append(parse_label(cells[at], task, path, number))
    if not texts:
        raise DataError(path, 1, "no rows below the header")
    return Split(texts, labels if labelled else None, hashlib.sha256(raw).hexdigest())


def _cells(path: Path, number: int, line: bytes) -> list[str]:
    try:
        return line.removesuffix(b"\r").decode("utf-8").split("\t")
    except UnicodeDecodeError as e:
        raise DataError(path, number, f"not UTF-8 at byte {e.start} of the line") from None


def _text_columns(path: Path, header: list[str], task: Task) -> tuple[str, ...]:
    choices = task.text_columns()
    for columns in choices:
        if set(columns) <= set(header):
            return columns
    wanted = " or ".join(", ".join(columns) for columns in choices)
    raise DataError(path, 1, f"expected the columns {wanted} and label, got {', '.join(header)}")


def parse_label(value: Any, task: Task, where: str | Path, line: int) -> int | float:
    """A label's number: a class number or class name, or a value in the task's range."""
    if task.labels is None:
        low, high = task.value_range
        try:
            number = float(value)
        except ValueError:
            raise DataError(where, line, f"label {value!r} is not a number") from None
        if not low <= number <= high:
            raise DataError(where, line, f"label {value!r} is outside {low:g} to {high:g}")
        return number
    text = str(value).strip()
    if text in task.labels:
        return task.labels.index(text)
    if text.isascii() and text.isdecimal() and int(text) < len(task.labels):
        return int(text)
    named = ", ".join(f"{i} ({name})" for i, name in enumerate(task.labels))
    raise DataError(where, line, f"unknown label {value!r}, expected {named}")


def from_hub(task: Task) -> Source | None:
    """The task from `nyu-mll/glue`, or None, with a printed reason, if the hub can't serve it."""
    if not hub_reachable() and not os.environ.get("HF_HUB_OFFLINE"):
        print("GLUE: the hub can't be reached (set HF_HUB_OFFLINE=1 to use a copy in its cache)")
        return None
    import datasets

    trained = TASKS[task.trains_on] if task.trains_on else task
    try:
        loaded = datasets.load_dataset(HUB, trained.hub)
        unlabelled = datasets.load_dataset(HUB, task.hub) if task.test else {}
    except Exception as e:  # the hub's client raises some ten unrelated types for "not there"
        reason = str(e).partition("\n")[0]
        print(f"GLUE: the hub gave no {HUB} ({task.hub}): {type(e).__name__}: {reason}")
        return None
    return from_splits(task, loaded, unlabelled)


def from_splits(task: Task, loaded: Any, unlabelled: Any) -> Source:
    """A `Source` from hub splits: mappings of split names to sequences of rows (dictionaries)."""
    trained = TASKS[task.trains_on] if task.trains_on else task
    train = _hub_split(trained, loaded, ("train",))
    dev = {name: _hub_split(trained, loaded, names) for name, names in trained.dev.items()}
    test = {
        name: _hub_split(task, unlabelled, names, labelled=False)
        for name, names in task.test.items()
    }
    return Source("hub", f"{HUB}/{task.hub}", task, train, dev, test)


def _hub_split(task: Task, loaded: Any, names: tuple[str, ...], labelled: bool = True) -> Split:
    name = next((n for n in names if n in loaded), None)
    if name is None:
        _missing(f"{HUB}/{task.hub}", names, loaded)
    where = f"{HUB}/{task.hub}/{name}"
    texts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    digest = hashlib.sha256()
    for number, row in enumerate(loaded[name], start=1):
        for column in task.text:
            if not isinstance(row.get(column), str):
                raise DataError(where, number, f"no text in column {column!r}")
        texts.append(tuple(row[column] for column in task.text))
        if labelled:
            labels.append(parse_label(row["label"], task, where, number))
        digest.update(json.dumps([*texts[-1], row.get("label")]).encode())
    return Split(texts, labels if labelled else None, digest.hexdigest())


def _missing(where: str, names: tuple[str, ...], loaded: Any) -> NoReturn:
    raise FileNotFoundError(
        f"{where}: none of the splits {', '.join(names)} in {', '.join(loaded)}"
    )


_reachable: bool | None = None


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether the hub answers within `seconds`; asked once, and never under HF_HUB_OFFLINE."""
    global _reachable
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if _reachable is None:
        answered: list[bool] = []

        def ask() -> None:
            url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(url, method="HEAD"), timeout=seconds
                ):
                    answered.append(True)
            except (OSError, ValueError):
                pass

        # a daemon thread, because name resolution has no timeout of its own
        thread = Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)
        _reachable = bool(answered)
    return _reachable


def embedded(train_rows: int = 2400, dev_rows: int = 400) -> Source:
    """Sentences of Python's documentation, intact (1) or with two neighbouring words swapped (0).

    Needs no file and no network. Every sentence occurs once, in one form. The same Python gives the
    same rows; the digests in `Source.to_dict` tell two Pythons apart.
    """
    rows = swap_rows(sentences())
    need = train_rows + dev_rows
    if len(rows) < need:
        # a stripped-down Python: keep the proportion
        dev_rows = len(rows) * dev_rows // need
        train_rows = len(rows) - dev_rows
    if dev_rows < 2:
        raise FileNotFoundError(
            "this Python carries no documentation to take sentences from; name a GLUE folder with "
            f"--data or {ENVIRONMENT}"
        )
    dev = _embedded_split(rows[:dev_rows])
    train = _embedded_split(rows[dev_rows : dev_rows + train_rows])
    where = "the documentation of the running Python"
    return Source("embedded", where, EMBEDDED, train, {"dev": dev}, {})


def _embedded_split(rows: list[tuple[str, int]]) -> Split:
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return Split([(text,) for text, _ in rows], [label for _, label in rows], digest)
