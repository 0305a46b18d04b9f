"""Which candidate serves a kind of call on a GPU: timed once on the user's own card, then remembered.

A kind of call is its operator, core, dtype, sizes (rows to the next power of two), layout of operands and
what it must return. Its fastest candidate is kept in memory and in one file per device and versions in the
cache folder. `FASTSPEC_BACKEND` forces a candidate. Nothing is timed in deterministic mode (another run
could choose, and so round, differently), while a CUDA graph is captured, while torch.compile traces, or
where there is one candidate only: the `rule` decides then, while tracing after what was timed before.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fastspec import __version__
from fastspec.files import cache_dir, write_json
from fastspec.kernels import records, tiles
from fastspec.kernels.launch import Launch, tracing, watched

NAMES = ("triton", "tma", "merged", "aten")
PLANNED = ("aten", "merged")  # as csrc/cuda_choices.h numbers them; a launch comes next


class Choices:
    """Kind of call -> candidate, backed by a JSON file that is only ever replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = self._read()

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self.path.read_text())
            return {k: v for k, v in found.items() if v in NAMES}
        except (OSError, ValueError, AttributeError):  # none yet, or not ours: it will be replaced
            return {}

    def remember(self, kind: str, name: str) -> None:
        """Keep the choice, with whatever other processes have written meanwhile."""
        self.known = {**self._read(), **self.known, kind: name}
        try:
            write_json(self.path, dict(sorted(self.known.items())))
        except OSError as e:
            warnings.warn(f"timings are not kept between runs: {self.path}: {e}", stacklevel=2)


_choices: dict[torch.device, Choices] = {}


def choices(device: torch.device) -> Choices:
    """The choices for this device's model and these versions of the libraries, read once a process."""
    found = _choices.get(device)
    if found is None:
        model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        versions = f"{__version__}-torch{torch.__version__}-triton{triton.__version__}"
        name = re.sub(r"[^\w.+-]+", "_", f"{model}-{versions}") + ".json"
        found = _choices.setdefault(device, Choices(cache_dir() / name))
    return found


# ------------------------------------------------------------------------------------------ choice


CALLS = 10  # in a row, as in training
LONGEST_WAIT = 1 << 28  # clock cycles, some 0.2 s: only calls that wait for the device need so many


def measure(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds that one call takes a CUDA device, after two to compile and warm up.

    The device is held up until all calls are queued: an idle one would wait for the host between them, and
    the host's time would be measured.
    """
    with torch.cuda.device(device):
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        times: list[float] = []
        wait = 1 << 22
        while len(times) < 5:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(wait)
            start.record()
            for _ in range(CALLS):
                call()
            stop.record()
            queued = not start.query()
            stop.synchronize()
            if queued or wait >= LONGEST_WAIT:
                times.append(start.elapsed_time(stop) / CALLS)
            else:
                wait *= 4
    return sorted(times)[len(times) // 2]


# of a layer's short side: from here cuBLAS's lead outweighs the fused kernels' saving
CUBLAS_WIDTH = 4096


def rule(candidates: Collection[str], dtype: torch.dtype, k: int, width: int) -> str:
    """The choice without timing, by what an H200 measured (docs/gpu.md).

    In 16 bits the fused kernels below `CUBLAS_WIDTH`, the layer's short side being `width`; in float32 one
    product with W_eff; else ATen's plan.
    """
    fused = dtype.itemsize == 2 and k <= tiles.FUSED_RANK["16bit"] and width < CUBLAS_WIDTH
    order = ("tma", "triton") if fused else ("merged",)
    return next((n for n in order if n in candidates), "aten")


def forced_candidate() -> str | None:
    """The candidate named by FASTSPEC_BACKEND.

    Raises:
        ValueError: it names none of `NAMES`.
    """
    forced = os.environ.get("FASTSPEC_BACKEND") or None
    if forced is not None and forced not in NAMES:
        raise ValueError(f"FASTSPEC_BACKEND must be one of {', '.join(NAMES)}, got {forced!r}")
    return forced


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an operator: its kind, and what can serve it by name."""

    kind: str
    candidates: Mapping[str, Callable[[], Any]]
    operand: Tensor  # x or dL/dy
    k: int
    width: int = 0  # the layer's short side
    traceable: bool = True  # False: ATen's calls look at values

    def run(self) -> Any:
        """The result by this kind's candidate, which is timed here if it has to be."""
        return self.candidates[self.choose()]()

    def run_to_keep(self, order: dict[str, int]) -> tuple:
        """The result as `run` gives it, and what csrc/cuda_choices.h may remember of how it came.

        `order` is that of the operands' addresses, `records.FORWARD` or `records.BACKWARD`.
        """
        name = self.choose()
        with watched() as launches:
            result = self.candidates[name]()
        return *result, self._answer(name, launches, order)

    def _answer(self, name: str, launches: Sequence[Launch], order: dict[str, int]) -> list[int]:
        if not self._settled():
            return []
        if name in PLANNED:
            return [PLANNED.index(name), 0, 0, 0]
        kept = records.keep(launches, order) if name in ("triton", "tma") else None
        return [] if kept is None else [len(PLANNED), *kept]

    def _settled(self) -> bool:
        """Whether a call of this kind, under the settings of now, is served alike from now on."""
        forced = forced_candidate()
        if forced is not None:
            return forced in self.candidates
        if len(self.candidates) == 1 or torch.are_deterministic_algorithms_enabled():
            return True
        return choices(self.operand.device).known.get(self.kind) in self.candidates

    def trace(self) -> Any:
        """The result by calls that torch.compile sees, or None where the operator has to stay whole.

        So it has where values decide, and where TMA was the fastest or is forced: PyTorch does not trace
        its descriptors through `wrap_triton`, and the operator takes them at run time.
        """
        fastest = choices(self.operand.device).known.get(self.kind)
        if not self.traceable or "tma" in (forced_candidate(), fastest):
            return None
        return self.candidates[self.choose(may_time=False)]()

    def choose(self, *, may_time: bool = True) -> str:
        """The name of the candidate for this kind of call.

        A forced candidate that cannot serve this call (a wide rank, an input without a gradient) leaves
        it to the `rule`, with a warning.
        """
        forced = forced_candidate()
        if forced is not None:
            if forced in self.candidates:
                return forced
            warnings.warn(f"FASTSPEC_BACKEND={forced} cannot serve: {self.kind}", stacklevel=2)
        by_rule = rule(self.candidates, self.operand.dtype, self.k, self.width)
        if forced or len(self.candidates) == 1 or torch.are_deterministic_algorithms_enabled():
            return by_rule
        found = choices(self.operand.device)
        if found.known.get(self.kind) in self.candidates:
            return found.known[self.kind]
        device = self.operand.device
        if not may_time or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return by_rule
        times = {name: measure(call, device) for name, call in self.candidates.items()}
        found.remember(self.kind, min(times, key=times.__getitem__))
        return found.known[self.kind]


def describe(direction: str, core: str, operands: Sequence[Tensor], *needs: bool) -> str:
    """The kind of a call, as the cache's key.

    Args:
        operands: x or dL/dy [N, columns], the weight [out, in], u [out, k] and vh [k, in].
        needs: what else tells calls apart.

    Row counts share one up to the next power of two.
    """
    a, weight, u, _ = operands
    rows = max(0, tiles.hint(a.shape[0]) - 1).bit_length()
    out, d, k = map(tiles.hint, (*weight.shape, u.shape[1]))
    traced = tracing()
    layouts = tuple([layout(t, traced) for t in operands])
    return _kind(direction, core, a.dtype, tiles.kind(a.dtype), rows, d, out, k, needs, layouts)


def layout(t: Tensor, traced: bool = False) -> str:
    """What a matrix's strides and address mean to its loads.

    "r" has rows of neighbours, "c" columns, "e" is expanded and "s" any other; "16" is added to the first
    two where rows (columns) and the first element lie on 16 bytes. The address of a traced tensor is taken
    for that of a new one.
    """
    down, across = map(tiles.hint, t.stride()) if traced else t.stride()
    if 0 in (down, across):
        return "e"
    if 1 not in (down, across):
        return "s"
    pitch, name = (down, "r") if across == 1 else (across, "c")
    size = t.element_size()
    address = tiles.hint(t.storage_offset()) * size if traced else t.data_ptr()
    return name + "16" if (pitch * size | address) % 16 == 0 else name


@functools.lru_cache(4096)
def _kind(
    direction: str,
    core: str,
    dtype: torch.dtype,
    arithmetic: str,
    rows: int,  # the power of two
    d: int,
    out: int,
    k: int,
    needs: tuple[bool, ...],
    layouts: tuple[str, ...],
) -> str:
    wants = "".join("01"[n] for n in needs)
    name = str(dtype).removeprefix("torch.")
    sizes = f"n{1 << rows} {d}->{out} k{k}"
    return f"{direction} {core} {name} {arithmetic} {sizes} {wants} {' '.join(layouts)}"
