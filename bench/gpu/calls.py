"""One layer's forward and backward by every candidate of the dispatcher, and their answers' errors."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from kernel_problems import exact, tf32
from support import TOLERANCE, relative_error
from torch import Tensor

import fastspec
from fastspec import _extension
from fastspec.kernels import dispatch
from fastspec.ops import aten
from fastspec.ops.kept import Room, keep_merged
from fastspec.precision import allows_tf32
from gpu.device import REHEARSING, as_on_card

CHOSEN = "chosen"  # what the dispatcher takes by itself
KEPT = "kept"  # with a copy of W + U C Vh that was made before
JOINED = "joined"  # the same beside its factors, as `fastspec.keep_merged` lays it out
# matrix units cut operands to TF32, which adds up along chains of products: of a gradient's six operands the
# kernels round two, and sqrt((4 x 3.5e-4)^2 + 6 x (2.2e-4)^2) = 1.5e-3 (tests/test_kernels, emulated)
TF32_TOLERANCE = 2e-3
Pair = tuple[Callable[[], tuple], Callable[[Tensor], tuple]]

fastspec.spectral_linear  # noqa: B018  (registers the operators)


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Only this candidate; ValueError where it can't serve a call inside."""
    before = os.environ.pop("FASTSPEC_BACKEND", None)
    if name not in (CHOSEN, KEPT, JOINED):
        os.environ["FASTSPEC_BACKEND"] = name
    elif REHEARSING:
        os.environ["FASTSPEC_BACKEND"] = "aten"  # there are no events to time by
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="FASTSPEC_BACKEND=.* cannot serve")
            try:
                with as_on_card() if name == JOINED else contextlib.nullcontext():
                    yield
            except UserWarning as error:
                raise ValueError(str(error)) from None
    finally:
        os.environ.pop("FASTSPEC_BACKEND", None)
        if before is not None:
            os.environ["FASTSPEC_BACKEND"] = before


def pair(t: dict, core: str, name: str = CHOSEN) -> Pair:
    """(forward, backward) of the operators on operands of `kernel_problems.problem`.

    Raises:
        ValueError: a copy can't be joined.
    """
    weight, u, vh, bias, forward = t["w"], t["u"], t["vh"], t["bias"], "factored"
    if name in (KEPT, JOINED):
        room = Room(torch.empty_like(weight))
        if name == JOINED:
            room = Room.like(weight, bias, u, vh)
            if room.u is None:
                raise ValueError("a joined copy cannot serve these operands")
        made_for = torch.empty_like(t["delta"])
        keep_merged(
            room.effective, made_for, weight, u, vh, t["delta"], core, True, bias, room.bias
        )
        weight, forward = room.effective, "resident"
        if room.u is not None:
            u, vh, bias = room.u, room.vh, room.bias
    common = {
        "weight": weight, "u": u, "s": torch.ones(u.shape[1], device=u.device),
        "vh": vh, "delta": t["delta"], "core": core, "gradient": "two_sided", "forward": forward,
    }  # fmt: skip
    first, second = operators(name)
    return (
        lambda: first(x=t["x"], bias=bias, **common),
        lambda p: second(g=t["g"], x=None, p=p, **common, needs_dx=True, needs_delta=True),
    )


def jacobi_eigh() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The compiled eigensolver.

    Raises:
        RuntimeError: it is not there; the message says why.
    """
    reason = _extension.load("_C" if REHEARSING else "_C_cuda", build=False)
    if reason is not None:
        raise RuntimeError(f"no jacobi_eigh: {reason}")
    return torch.ops.fastspec.jacobi_eigh


def operators(name: str = CHOSEN) -> tuple[Callable, Callable]:
    """Forward and backward as the card has them; a rehearsal goes to the dispatcher past the CPU's own."""
    if REHEARSING and name != JOINED:
        return (
            functools.partial(dispatch.spectral_linear, aten=aten.spectral_linear),
            functools.partial(
                dispatch.spectral_linear_backward, aten=aten.spectral_linear_backward
            ),
        )
    found = torch.ops.fastspec
    return found.spectral_linear.default, found.spectral_linear_backward.default


def errors(t: dict, core: str, name: str) -> dict[str, float]:
    """Relative errors of y, p, dx and d delta against float64.

    Raises:
        ValueError: the candidate can't serve this layer.
    """
    with forced(name):
        forward, backward = pair(t, core, name)
        for _ in range(3):  # the last one repeats what the first has left (kernels/records.py)
            y, p = forward()
            dx, grad = backward(p)
    want = exact(t, core)
    results = zip(("y", "p", "dx", "d delta"), (y, p, dx, grad), want, strict=True)
    return {name: relative_error(got, exact) for name, got, exact in results}


def tolerance(dtype: torch.dtype) -> float:
    return TF32_TOLERANCE if dtype == torch.float32 and allows_tf32() else TOLERANCE[dtype]


__all__ = [
    "CHOSEN",
    "JOINED",
    "KEPT",
    "Pair",
    "errors",
    "forced",
    "jacobi_eigh",
    "pair",
    "tf32",
    "tolerance",
]
