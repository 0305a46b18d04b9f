"""The compiled part (csrc/): loaded on first use; a failure is remembered with its reason."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


@functools.cache
def unavailable_reason() -> str | None:
    """Why the compiled operators can't be used, or None where they are loaded and ready."""
    libraries = sorted(_FOLDER.glob("_C*.so"))
    if not libraries:
        note = _FOLDER / "_build.txt"
        return note.read_text().strip() if note.exists() else "it was not built at installation"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as e:
        return f"{libraries[0].name} does not load (built for another torch?): {e}"
    return None


@functools.cache
def has_thin_products() -> bool:
    """Whether `fastspec::thin_project` and `fastspec::thin_merge` run on this processor."""
    return unavailable_reason() is None and bool(torch.ops.fastspec.thin_supported())


def serves(tensor: torch.Tensor) -> bool:
    """Whether the compiled operators take this tensor: they are loaded, and it is on the CPU."""
    return tensor.device.type == "cpu" and unavailable_reason() is None
