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
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from fastspec import _extension

DEVICE = "cuda"  # whose tensors are traced through; tests trace on a CPU
_served: dict[str, Callable[..., Any]] = {}
_on_cpu = False  # inside `on_cpu`


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not loaded."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _dispatch() -> Any:
    """The dispatcher, or None where Triton is not installed."""
    if not has_triton():
        return None
    from fastspec.kernels import dispatch

    return dispatch


def _in_csrc() -> bool:
    """Whether the compiled part is there and serves CUDA: one built from older sources does not."""
    return _extension.load() is None and hasattr(torch.ops.fastspec, "serve_cpu_as_cuda")


def serves(device: torch.device) -> bool:
    """Whether tensors of this device take the route of CUDA tensors."""
    return device.type == "cuda" or _on_cpu


def joins_products(device: torch.device) -> bool:
    """Whether csrc/cuda_joined.cpp and csrc/cuda_shared_input.cpp serve tensors of this device."""
    return serves(device) and _in_csrc() and hasattr(torch.ops.fastspec, "shared_input")


@functools.cache
def _records() -> Any:
    from fastspec.kernels import records

    return records


def register(name: str, aten: Callable[..., Any], schema: str | None = None) -> None:
    """Let `dispatch.<name>` serve `fastspec::<name>` on CUDA, eager and traced; `aten` without Triton.

    With the operator's `schema`, and csrc/ built, it serves by way of csrc/cuda_operators.cpp, which asks
    `fastspec::choose_<name>` for calls that are new to it. An exported program keeps the operator whole: it
    shall not depend on the card it was exported on.
    """
    operator = f"fastspec::{name}"

    def served(*args: Any, **options: Any) -> Any:
        kernels = _dispatch()
        if kernels is None:
            return (*aten(*args), [0, 0, 0, 0]) if options else aten(*args)
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            return getattr(kernels, name)(*args, aten=aten, **options)

    if schema is not None and _in_csrc():
        chooser = f"fastspec::choose_{name}"
        torch.library.define(
            chooser, schema.replace("-> (Tensor, Tensor)", "-> (Tensor, Tensor, int[])")
        )
        choose = functools.partial(served, keep=True)
        torch.library.impl(chooser, "CompositeExplicitAutograd", choose)
    else:
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


# csrc/cuda_reduce.cpp asks it for calls that are new to it: the gradient, and what to remember
torch.library.define("fastspec::choose_reduce_diagonal", "(Tensor q, Tensor p) -> (Tensor, int[])")


@torch.library.impl("fastspec::choose_reduce_diagonal", "CompositeExplicitAutograd")
def _(q: Tensor, p: Tensor) -> tuple[Tensor, list[int]]:
    if has_triton():
        from fastspec.kernels import reduce

        if reduce.serves(q, p):
            with torch.cuda.device_of(q):
                return reduce.reduce_to_keep(q, p)
    return (q.float() * p).sum(0).float(), [0, 0, 0, 0]


torch.library.define("fastspec::launch", "(int record, int[] addresses) -> ()")


@torch.library.impl("fastspec::launch", "CompositeExplicitAutograd")
def _(record: int, addresses: list[int]) -> None:
    _records().start(record, addresses)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, CPU tensors take the route of CUDA tensors: for tests and timings without a GPU."""
    global _on_cpu
    library = torch.library.Library("fastspec", "IMPL")
    compiled = _in_csrc()
    try:
        _on_cpu = True
        if compiled:
            torch.ops.fastspec.serve_cpu_as_cuda(True)
        for name, served in _served.items():
            library.impl(name, served, "CPU", allow_override=True)
        yield
    finally:
        _on_cpu = False
        library._destroy()
        if compiled:
            torch.ops.fastspec.serve_cpu_as_cuda(False)
