"""PyTorch's float32 precision of products: one way to read and to raise it, for both of its interfaces.

Since torch 2.9 there is a `fp32_precision` for each backend beside `allow_tf32` and
`set_float32_matmul_precision`; once one of them was set, reading by the older names raises.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_MATMULS = [
    m for b in (torch.backends.cuda, torch.backends.mkldnn) if (m := getattr(b, "matmul", None))
]
_FULL = ("ieee", "none")
_HAS_FP32_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")

_lock = threading.Lock()
_inside = 0  # how many threads are in `full_float32`
_restored: tuple[str | None, list[str]] | None = None  # what the last of them puts back


def allows_tf32() -> bool:
    """Whether float32 products on CUDA may use TF32."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if _HAS_FP32_PRECISION else matmul.allow_tf32


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products in full precision, TF32 and bfloat16 switched off on every device.

    PyTorch has one setting for the whole process. Where it is full already, nothing is touched. Else it is
    raised while any thread is inside, for the others too, and put back when the last one leaves, unless it
    was set anew meanwhile.
    """
    global _inside, _restored
    with _lock:
        _inside += 1
        if (before := _settings()) is not None:
            _restored = before
            _set_full(before)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _restored is not None:
                if _settings() is None:
                    _restore(*_restored)
                _restored = None


@contextlib.contextmanager
def full_precision(*devices: str) -> Iterator[None]:
    """`full_float32`, and no autocast on devices of these types: float32 arithmetic, whatever is around."""
    with full_float32(), contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _settings() -> tuple[str | None, list[str]] | None:
    """(the older interface's value, None where it can't be read; each backend's), None if all is full."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # mixed with the newer one
        older = None
    newer = [m.fp32_precision for m in _MATMULS] if _HAS_FP32_PRECISION else []
    full = all(p in _FULL for p in newer) if _HAS_FP32_PRECISION else older == "highest"
    return None if full else (older, newer)


def _set_full(before: tuple[str | None, list[str]]) -> None:
    older, newer = before
    if older is not None:
        torch.set_float32_matmul_precision("highest")  # sets the newer ones too
    else:
        for matmul, precision in zip(_MATMULS, newer, strict=True):
            if precision not in _FULL:
                matmul.fp32_precision = "ieee"


def _restore(older: str | None, newer: list[str]) -> None:
    if older is not None:
        torch.set_float32_matmul_precision(older)
    for matmul, precision in zip(_MATMULS, newer, strict=False):
        matmul.fp32_precision = "none"  # what is set for all backends shows through
        if matmul.fp32_precision != precision:
            matmul.fp32_precision = precision
