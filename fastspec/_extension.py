"""The compiled parts (csrc/): loaded when an operator is first needed, built then where they are not there.

A part lies beside the package, where the installation built it, or in the user's cache, in a folder named
after all that a build depends on. What can't be loaded or built is remembered with its reason.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fastspec import _build
from fastspec.files import cache_dir, write_atomically

_FOLDER = Path(__file__).parent
_BUILT_FOR = re.compile(
    rb"fastspec built for torch (\d+\.\d+\.\d+)[^,]*, Python (?:(\d+\.\d+)|any)"
)
_known: dict[str, str | None] = {}  # part to why it can't be used; None: it is loaded


def load(part: str = "_C", *, build: bool = True) -> str | None:
    """Load a compiled part, `"_C"` or `"_C_cuda"` (which needs the other), once a process.

    Args:
        part: which.
        build: compile it into the user's cache where it is not there yet. That takes a minute or two,
            once; one line on stderr says so. `FASTSPEC_NO_EXT=1` forbids it, and loading too.

    Returns:
        None where it is loaded, else why it can't be used.
    """
    known = _known.get(part, "")
    if part not in _known or (build and known is not None and known.endswith(_NOT_BUILT)):
        reason = load("_C", build=build) if part != "_C" else None
        _known[part] = reason or _load(part, build)
    return _known[part]


def unavailable_reason(part: str = "_C") -> str | None:
    """Why a part can't be used, or None where nothing speaks against it yet. Loads and builds nothing."""
    return _known[part] if part in _known else _load(part, build=False, load=False)


_NOT_BUILT = "not built yet: `fastspec build` does so, or the first use"


def _load(part: str, build: bool, load: bool = True) -> str | None:
    """Why a part can't be loaded, by trying; with `load=False` only what can be told before."""
    if os.environ.get("FASTSPEC_NO_EXT") == "1":
        return "switched off by FASTSPEC_NO_EXT=1"
    if part == "_C_cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    reasons = []
    installed = _FOLDER / f"{part}.so"
    if installed.exists():
        reason = _try(installed, load)
        if reason is None:
            return None
        reasons.append(reason)
    else:
        reasons += _notes(part)
    try:
        folder = build_folder(part)
        library, failure = folder / f"{part}.so", folder / f"{part}.failed"
        if not library.exists():
            if failure.exists():
                raise _build.CannotBuildError(failure.read_text())
            if not build:
                return "; ".join([*reasons, _NOT_BUILT])
            _build_once(part, folder)
        reason = _try(library, load)
        if reason is None:
            return None
        reasons.append(reason)
    except (OSError, _build.CannotBuildError) as e:
        reasons.append(str(e))
    return "; ".join(reasons)


def build_folder(part: str) -> Path:
    """Where a build of these very sources, torch and compiler lies in the user's cache."""
    return cache_dir() / "build" / f"torch{torch.__version__}-{_build.key(part)}"


def rebuild(part: str) -> str | None:
    """Build a part into the cache whatever is there (`fastspec build`); None, or why it can't be.

    A process that has loaded it already goes on with what it has.
    """
    try:
        folder = build_folder(part)
        (folder / f"{part}.failed").unlink(missing_ok=True)
        _build_once(part, folder)
    except (OSError, _build.CannotBuildError) as e:
        return str(e)
    return None


def _build_once(part: str, folder: Path) -> None:
    """Build into `folder`, one process at a time; the others wait and find it there.

    Raises:
        CannotBuildError: why not; the reason is kept beside, so that the next process doesn't try again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    since = time.time()
    with _locked(folder / "lock"):
        library, failure = folder / f"{part}.so", folder / f"{part}.failed"
        if library.exists() and library.stat().st_mtime > since:
            return
        if failure.exists():
            raise _build.CannotBuildError(failure.read_text())
        print(
            f"fastspec: compiling {part} once for torch {torch.__version__}, a minute or two "
            "(FASTSPEC_NO_EXT=1 does without it) ...",
            file=sys.stderr,
            flush=True,
        )
        try:
            _build.build_into(part, folder)
        except _build.CannotBuildError as e:
            write_atomically(failure, str(e).encode())
            print(f"fastspec: going on without {part}: {e}", file=sys.stderr, flush=True)
            raise
        print(
            f"fastspec: {part} compiled in {time.time() - since:.0f} s", file=sys.stderr, flush=True
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system frees however the process ends; none where the system has no such."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _notes(part: str) -> list[str]:
    """Why the installation did not build a part, where it left word."""
    notes = _FOLDER / "_build.txt"
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [line.partition(": ")[2] for line in lines if line.startswith(f"{part}: ")]


def _try(library: Path, load: bool) -> str | None:
    """Why a library does not serve here: it says what it was built for, and loading may fail."""
    if built := _BUILT_FOR.search(library.read_bytes()):
        here = torch.__version__.partition("+")[0], platform.python_version()
        for name, wanted, running in zip(("torch", "Python"), built.groups(), here, strict=True):
            if wanted and re.match(rf"{re.escape(wanted.decode())}(?!\d)", running) is None:
                return f"{library.name} was built for {name} {wanted.decode()}, this is {running}"
    if load:
        try:
            torch.ops.load_library(str(library))
        except (OSError, RuntimeError) as e:
            return f"{library.name} does not load (built for another torch?): {e}"
    return None


def has_thin_products() -> bool:
    """Whether `fastspec::thin_project` and `fastspec::thin_merge` run on this processor."""
    return load() is None and bool(torch.ops.fastspec.thin_supported())


def serves(tensor: torch.Tensor) -> bool:
    """Whether the compiled `topk_svd` takes this tensor: it is loaded, and serves its device."""
    if tensor.device.type == "cuda":
        load("_C_cuda")  # its eigensolver; without it cuSOLVER serves
    return tensor.device.type in ("cpu", "cuda") and load() is None
