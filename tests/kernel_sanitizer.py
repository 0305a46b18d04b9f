"""Checks that the interpreter makes possible: every access in bounds, and nothing hidden by a mask.

The interpreter hands each load and store its raw addresses. While the sanitizer is on, every address
that a mask lets through must be an element of a tensor that this launch was given (not merely lie in
its storage), lanes that a mask hides read NaN unless the kernel says otherwise, and tensors from
`torch.empty` start as NaN inside poisoned margins.

(triton-viz 3.0 has a sanitizer too; it does not import beside Triton 3.9, whose interpreter lacks the
`create_make_block_ptr` that it patches.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fastspec.kernels import shift, sigma_grad, tile_program

MARGIN = 64


class OutOfBounds(AssertionError):
    """A kernel touched an address that belongs to none of its operands."""


class Sanitizer:
    def __init__(self) -> None:
        self.elements = np.empty(0, dtype=np.uint64)
        self.guarded: list[tuple[Tensor, Tensor]] = []
        self.reachable: list[Tensor] = []  # through addresses that a kernel reads from memory

    def allow(self, tensors: list[Tensor]) -> None:
        """Allow these tensors' elements, one address each, whatever their strides; nothing else."""
        found = []
        for t in tensors:
            places = torch.zeros((), dtype=torch.int64)
            for size, stride in zip(t.shape, t.stride(), strict=True):
                places = places[..., None] + torch.arange(size) * stride
            found.append(places.reshape(-1).numpy() * t.element_size() + t.data_ptr())
        self.elements = np.unique(np.concatenate(found)).astype(np.uint64)

    def guard(self, t: Tensor, pad: int = 3) -> Tensor:
        """A copy of `t` with NaN all around it: between its rows and in wide margins."""
        shape = [*t.shape[:-1], t.shape[-1] + pad]
        whole = torch.full(
            (MARGIN + int(np.prod(shape)) + MARGIN,), _poison(t.dtype), dtype=t.dtype
        )
        inner = whole[MARGIN:-MARGIN].view(shape)[..., : t.shape[-1]]
        inner.copy_(t)
        self.guarded.append((whole, inner))
        return inner

    def check(self, addresses: np.ndarray, mask: np.ndarray, what: str) -> None:
        wanted = np.unique(np.broadcast_to(addresses, mask.shape)[mask.astype(bool)])
        at = np.searchsorted(self.elements, wanted)
        ok = at < len(self.elements)
        ok[ok] = self.elements[at[ok]] == wanted[ok]
        if not ok.all():
            raise OutOfBounds(f"{what} at {int((~ok).sum())} addresses outside every operand")

    def check_margins(self) -> None:
        """Whatever lies around the guarded tensors is still the poison put there."""
        for whole, inner in self.guarded:
            left = whole.clone()
            start = inner.storage_offset()
            left.as_strided(inner.shape, inner.stride(), start).fill_(_poison(whole.dtype))
            untouched = left.isnan() if left.is_floating_point() else left == _poison(left.dtype)
            assert untouched.all(), "a store reached the margin of a buffer"


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _bfloat16_values(t: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if t.dtype.scalar != tl.bfloat16:
        return t
    return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@triton.jit
def _itself(t, PRECISION: tl.constexpr):
    return t


def without_rounding(patch: pytest.MonkeyPatch) -> None:
    """Operands of TF32 stay as they are: the interpreter multiplies in full float32, which shows all else."""
    for module in (sigma_grad, tile_program, shift):
        patch.setattr(module, "rounded", _itself)


def as_matrix_units(patch: pytest.MonkeyPatch) -> None:
    """Products in TF32 cut the low 13 bits of their operands off, as the matrix units do."""
    dot = interpreter.InterpreterBuilder.create_dot

    def cut(t: interpreter.TensorHandle) -> interpreter.TensorHandle:
        bits = np.ascontiguousarray(t.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot_in_tf32(self, a, b, d, precision, *args):
        if "TF32" in str(precision):
            a, b = cut(a), cut(b)
        return dot(self, a, b, d, precision, *args)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_tf32)


@contextlib.contextmanager
def sanitized() -> Iterator[Sanitizer]:
    """Watch every access of the kernels that run inside."""
    watch = Sanitizer()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    dot = builder.create_dot
    launch = interpreter.GridExecutor.__call__

    def watched_launch(self, *args, **kwargs):
        operands = [getattr(a, "base", a) for a in (*args, *kwargs.values())]
        outputs = [inner for _, inner in watch.guarded] if watch.reachable else []
        watch.allow([a for a in (*operands, *watch.reachable, *outputs) if isinstance(a, Tensor)])
        return launch(self, *args, **kwargs)

    def checked_load(self, ptrs, mask, other, cache_policy, is_volatile):
        watch.check(ptrs.data, mask.data, "load")
        loaded = load(self, ptrs, mask, other, cache_policy, is_volatile)
        if other is None and loaded.data.dtype.kind == "f":
            loaded.data[~mask.data.astype(bool)] = np.nan
        return loaded

    def checked_store(self, ptrs, value, mask, cache_policy):
        watch.check(ptrs.data, mask.data, "store")
        return store(self, ptrs, value, mask, cache_policy)

    def dot_of_values(self, a, b, *args):
        # Triton 3.9's interpreter keeps bfloat16 as bit patterns and would multiply those as integers
        return dot(self, _bfloat16_values(a), _bfloat16_values(b), *args)

    def guarded_empty(*shape, dtype=torch.float32, device=None):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return watch.guard(torch.full(tuple(shape), _poison(dtype), dtype=dtype), pad=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(builder, "create_dot", dot_of_values)
        patch.setattr(interpreter.GridExecutor, "__call__", watched_launch)
        patch.setattr(torch, "empty", guarded_empty)
        yield watch
    watch.check_margins()
