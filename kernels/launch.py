"""How a kernel starts: by Triton itself, or through PyTorch's operator for kernels where something traces."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._C import _get_dispatch_mode, _len_torch_dispatch_stack, _TorchDispatchModeKey
from torch.library import wrap_triton

_TRACERS = (
    _TorchDispatchModeKey.FUNCTIONAL,
    _TorchDispatchModeKey.PROXY,
    _TorchDispatchModeKey.FAKE,
)


def tracing() -> bool:
    """Whether tensors carry no values now: torch.compile, AOTAutograd, make_fx or fake tensors are at work.

    `torch.compiler.is_compiling()` alone does not say so: AOTAutograd of torch 2.11 traces without it.
    """
    if torch.compiler.is_compiling():
        return True
    return _len_torch_dispatch_stack() > 0 and any(map(_get_dispatch_mode, _TRACERS))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One start of a kernel: what it was given by name, and what Triton compiled for it."""

    kernel: Any
    grid: tuple[int, ...]
    operands: dict[str, Any]
    compiled: Any


class _Watched(threading.local):
    launches: list[Launch] | None = None


_watched = _Watched()


@contextlib.contextmanager
def watched() -> Iterator[list[Launch]]:
    """The launches of this thread inside, in order."""
    before, _watched.launches = _watched.launches, []
    try:
        yield _watched.launches
    finally:
        _watched.launches = before


def launch(kernel: Any, grid: Sequence[int], **operands: Any) -> None:
    """Start a `triton.jit` kernel on `grid`.

    `wrap_triton` would serve eagerly too, but keeps what it was given in a table for ever: one entry a
    launch, and with TMA descriptors the tensors.
    """
    started = wrap_triton(kernel) if tracing() else kernel
    compiled = started[tuple(grid)](**operands)
    if _watched.launches is not None:
        _watched.launches.append(Launch(kernel, tuple(grid), operands, compiled))
