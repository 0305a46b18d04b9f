"""The device of the measurements: a CUDA card, or in a rehearsal the CPU with the same calls.

In a rehearsal (FASTSPEC_GPU_REHEARSE=1) clocks are wall clocks, memory counts as zero, and `graphed` runs
its step under a check instead of capturing it: nothing that a capture forbids may be called.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastspec.model.graphed import WARMUP, capture
from fastspec.ops import cuda

REHEARSING = os.environ.get("FASTSPEC_GPU_REHEARSE") == "1"
DEVICE = torch.device("cpu" if REHEARSING else "cuda")
AHEAD = 1_000_000  # cycles, about 0.5 ms: long enough for the host to enqueue what is timed

Step = Callable[[], object]


def pick(real: Any, tiny: Any) -> Any:
    """A size: the real one on a card, a tiny one in a rehearsal."""
    return tiny if REHEARSING else real


@contextlib.contextmanager
def as_on_card() -> Iterator[None]:
    """In a rehearsal, inside, operators take the card's way through csrc/, with ATen's calls for kernels."""
    with contextlib.ExitStack() as stack:
        if REHEARSING:
            stack.enter_context(mock.patch.dict(os.environ, FASTSPEC_BACKEND="aten"))
            stack.enter_context(cuda.on_cpu())
        yield


def synchronise() -> None:
    if not REHEARSING:
        torch.cuda.synchronize()


def wall(step: Step) -> float:
    """Seconds of wall time until the device has finished."""
    synchronise()
    start = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - start


def on_device(step: Step) -> float:
    """Seconds on the device alone: it is kept busy while the host enqueues, so launches leave no gap."""
    if REHEARSING:
        return wall(step)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    step()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def graphed(step: Step, launches: bool = False) -> Step:
    """The step as a CUDA graph: a callable that replays it and returns what the captured call returned.

    `launches` says that Triton kernels are launched inside: a rehearsal interprets them, which waits.
    """
    if REHEARSING:
        for _ in range(WARMUP):
            step()
        with contextlib.nullcontext() if launches else _NothingThatWaits():
            step()
        return step
    return capture(step)


def allocated() -> int:
    """Bytes of live tensors on the card."""
    return 0 if REHEARSING else torch.cuda.memory_allocated()


def peak_bytes(step: Step) -> int:
    """Most bytes held at once in a step, above what was held before it."""
    synchronise()
    if not REHEARSING:
        torch.cuda.reset_peak_memory_stats()
    before = allocated()
    step()
    synchronise()
    return 0 if REHEARSING else torch.cuda.max_memory_allocated() - before


def cache_bytes() -> int:
    """Size of the L2 cache."""
    return 2**16 if REHEARSING else torch.cuda.get_device_properties(0).L2_cache_size


def free() -> None:
    """Give back what is held no more."""
    gc.collect()
    if not REHEARSING:
        torch.cuda.empty_cache()


class _NothingThatWaits(TorchDispatchMode):
    """Refuses operators that make the host wait for the device, or copy to it: a capture would fail."""

    REFUSED = (
        "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2",
        "unique_dim", "unique_consecutive", "lift_fresh",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in self.REFUSED or by_mask:
            raise RuntimeError(f"{name} can't be captured in a CUDA graph")
        return func(*args, **(kwargs or {}))
