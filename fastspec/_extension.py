"""The compiled parts (csrc/): loaded on first use; a failure is remembered with its reason.

`load` loads what serves a device; everything else only asks, and says what is known without loading.
"""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_BUILT_FOR = re.compile(
    rb"fastspec built for torch (\d+\.\d+\.\d+)[^,]*, Python (?:(\d+\.\d+)|any)"
)
_loaded: dict[str, str | None] = {}  # part -> why it did not load, or None


def load(device_type: str = "cpu") -> None:
    """Load the compiled parts that serve a type of device, where they are built; once a process."""
    for part in ("_C", "_C_cuda") if device_type == "cuda" else ("_C",):
        if part not in _loaded:
            _loaded[part] = _obstacle(part) or _load(part)
        if _loaded[part] is not None:
            return


def unavailable_reason() -> str | None:
    """Why the compiled operators can't be used, or None where nothing is known to stand against it."""
    return _reason("_C")


def cuda_unavailable_reason() -> str | None:
    """Why the compiled operators have no CUDA kernels, or None likewise."""
    return unavailable_reason() or _reason("_C_cuda")


def _reason(part: str) -> str | None:
    return _loaded[part] if part in _loaded else _obstacle(part)


@functools.cache
def _obstacle(part: str) -> str | None:
    """Why `part` is not even to be loaded."""
    if os.environ.get("FASTSPEC_NO_EXT") == "1":
        return "switched off by FASTSPEC_NO_EXT=1"
    library = _FOLDER / f"{part}.so"
    if not library.exists():
        notes = _FOLDER / "_build.txt"
        for line in notes.read_text().splitlines() if notes.exists() else ():
            name, _, reason = line.partition(": ")
            if name == part:
                return reason
        return "it was not built at installation"
    if built := _BUILT_FOR.search(library.read_bytes()):
        here = torch.__version__.partition("+")[0], platform.python_version()
        for name, wanted, running in zip(("torch", "Python"), built.groups(), here, strict=True):
            if wanted and re.match(rf"{re.escape(wanted.decode())}(?!\d)", running) is None:
                return f"{library.name} was built for {name} {wanted.decode()}, this is {running}"
    return None


def _load(part: str) -> str | None:
    library = _FOLDER / f"{part}.so"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as e:
        return f"{library.name} does not load (built for another torch?): {e}"
    return None


@functools.cache
def has_thin_products() -> bool:
    """Whether `fastspec::thin_project` and `fastspec::thin_merge` run on this processor."""
    load()
    return unavailable_reason() is None and bool(torch.ops.fastspec.thin_supported())


def serves(tensor: torch.Tensor) -> bool:
    """Whether the compiled `topk_svd` takes this tensor, whose device's parts are loaded here."""
    if tensor.device.type not in ("cpu", "cuda"):
        return False
    load(tensor.device.type)
    return unavailable_reason() is None
