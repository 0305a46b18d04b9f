"""Files that are whole or absent: written to a temporary name beside the target, then renamed."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ADAPTER_FILE = "adapter.safetensors"
_UNFINISHED = ".tmp"
_ABANDONED_SECONDS = 60  # between a file's beginning and its lock lies less


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder, in which an adapter may lie beside the model's own."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if file.name != ADAPTER_FILE] or files


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` once all of it is there, and leaves no trace otherwise.

    What a killed process left of it is removed first.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for file in target.parent.glob(f".{glob.escape(target.name)}.*{_UNFINISHED}"):
        _remove_abandoned(file)
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=_UNFINISHED)
    try:
        with os.fdopen(fd, "wb") as f:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(f, fcntl.LOCK_EX)
            yield f
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(name, target)
    except BaseException as e:
        Path(name).unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(target)  # which a full disk does not name
        raise


def is_unfinished(path: Path) -> bool:
    """Whether it is what `whole_file` writes, or a kill left, before it has its name."""
    return path.name.startswith(".") and path.name.endswith(_UNFINISHED)


def _remove_abandoned(file: Path) -> None:
    """Remove a file that `whole_file` began and no process writes any more: its lock is free."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # locked, removed by another process, or not ours to remove
        if time.time() - file.stat().st_mtime < _ABANDONED_SECONDS:
            return
        with file.open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


def cache_dir() -> Path:
    """`$FASTSPEC_CACHE`, or `fastspec` in the user's cache folder; made when first written to."""
    if folder := os.environ.get("FASTSPEC_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastspec"


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` so that `path` holds either its former content or all of the new one."""
    with whole_file(path) as f:
        f.write(data)


def join_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[Path, str]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of tensors that lie in others: name to file and name there.

    Their bytes are copied from file to file, so memory holds none of them. Format: 8 bytes that count
    those of a JSON header, the header, the tensors without gaps; wide entries first, so that all lie
    aligned.
    """
    headers = {file: _safetensors_header(file) for file, _ in tensors.values()}
    found = []  # width of an entry, name, file, offset, bytes, header's entry
    for name, (file, key) in tensors.items():
        start, header = headers[file]
        about = header[key]
        begin, end = about["data_offsets"]
        width = (end - begin) // max(1, math.prod(about["shape"]))
        found.append((-width, name, file, start + begin, end - begin, about))
    found.sort(key=lambda one: one[:2])
    joined: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for _, name, _, _, size, about in found:
        joined[name] = about | {"data_offsets": [at, at + size]}
        at += size
    text = json.dumps(joined, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, _, file, offset, size, _ in found:
            with file.open("rb") as f:
                f.seek(offset)
                _copy(f, out, size)


def _safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """(where the tensors begin, the header)"""
    with path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        return 8 + size, json.loads(f.read(size))


def _copy(source: BinaryIO, to: BinaryIO, size: int) -> None:
    while size:
        data = source.read(min(size, 1 << 20))
        if not data:
            raise OSError(f"{source.name} ends {size} bytes too early; remove it and start again")
        to.write(data)
        size -= len(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`write_atomically` of indented JSON; ValueError for NaN and infinity, which JSON has not."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def excerpt(value: Any, limit: int = 200) -> str:
    """What a message shows of a value from outside: names quoted, and no more than `limit` characters."""
    text = repr(value) if not isinstance(value, Exception) else str(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"
