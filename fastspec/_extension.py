"""The compiled parts (csrc/): loaded on first use; a failure is remembered with its reason."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent


@functools.cache
def unavailable_reason() -> str | None:
    """Why the compiled operators can't be used, or None where they are loaded and ready."""
    return _load("_C")


@functools.cache
def cuda_unavailable_reason() -> str | None:
    """Why the compiled operators have no CUDA kernels, or None where those are loaded too."""
    return unavailable_reason() or _load("_C_cuda")


def _load(part: str) -> str | None:
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
    try:
        torch.ops.load_library(str(library))
    except OSError as e:
        return f"{library.name} does not load (built for another torch?): {e}"
    return None


@functools.cache
def has_thin_products() -> bool:
    """Whether `fastspec::thin_project` and `fastspec::thin_merge` run on this processor."""
    return unavailable_reason() is None and bool(torch.ops.fastspec.thin_supported())


def serves(tensor: torch.Tensor) -> bool:
    """Whether the compiled `topk_svd` takes this tensor: it is loaded, and serves its device."""
    return tensor.device.type in ("cpu", "cuda") and unavailable_reason() is None
