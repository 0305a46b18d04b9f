"""Operators whose CUDA implementation is the dispatcher, registered without loading Triton.

`torch.library.triton_op` makes torch.compile see the launches of an operator that is Triton on every
device. These are compiled C++ or ATen on a CPU, so the same is done here for CUDA alone: where
AOTAutograd traces (`FunctionalTensorMode`), the operator gives way to the calls that it makes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensorMode

DEVICE = "cuda"  # whose tensors are traced through; tests trace on a CPU
_served: dict[str, Callable[..., Any]] = {}


@functools.cache
def _dispatch() -> Any:
    """The dispatcher, or None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from fastspec.kernels import dispatch

    return dispatch


def register(name: str, aten: Callable[..., Any]) -> None:
    """Let `dispatch.<name>` serve `fastspec::<name>` on CUDA, eager and traced; `aten` without Triton.

    An exported program keeps the operator whole: it shall not depend on the card it was exported on.
    """
    operator = f"fastspec::{name}"

    def served(*args: Any) -> Any:
        kernels = _dispatch()
        if kernels is None:
            return aten(*args)
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            return getattr(kernels, name)(*args, aten=aten)

    torch.library.impl(operator, "CUDA", served)
    _served[name] = served

    @torch.library.register_torch_dispatch(operator, FunctionalTensorMode)
    def _(mode: Any, op: Any, types: Any, args: tuple, kwargs: dict | None) -> Any:
        on_cuda = args[0].device.type == DEVICE and _dispatch() is not None
        if on_cuda and not torch.compiler.is_exporting():
            with mode:
                traced = getattr(_dispatch(), name)(*args, aten=aten, trace=True)
            if traced is not None:
                return traced
        return mode.__torch_dispatch__(op, types, args, kwargs or {})


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, CPU tensors take the route of CUDA tensors: for tests and timings of the host, without a GPU."""
    library = torch.library.Library("fastspec", "IMPL")
    try:
        for name, served in _served.items():
            library.impl(name, served, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
