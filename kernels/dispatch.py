"""The operators on a GPU: the candidates, timed once per kind of call on the user's own card.

    triton       the fused tile program                        (spectral_linear.py)
    descriptors  the same with the bulk copy engine, sm_90 on  (hopper.py)
    merged       W_eff in scratch, cuBLAS, and `sigma_grad`     (float32: 16 bits would round it)
    aten         the plan's own ATen calls                     (aten.py; always possible)

A kind of call is its direction, core, dtype, sizes (rows to the next power of two) and what it must
return. Its fastest candidate is remembered in memory and in one file per device and versions under
`cache_dir()`. `FASTSPEC_BACKEND` forces a candidate. Nothing is timed in deterministic mode (another run
could choose, and so round, differently), while a CUDA graph is captured, or for calls with a plan that
only ATen serves: the `rule` decides then.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import triton
from torch import Tensor

from fastspec import __version__, aten
from fastspec.files import write_json
from fastspec.kernels import hopper, tiles
from fastspec.kernels import spectral_linear as plain
from fastspec.kernels.sigma_grad import MAX_RANK, sigma_grad

NAMES = ("triton", "descriptors", "merged", "aten")
T = TypeVar("T")
Candidates = Mapping[str, Callable[[], T]]


# ------------------------------------------------------------------------------------------- cache


def cache_dir() -> Path:
    """`$FASTSPEC_CACHE`, or `fastspec` in the user's cache folder; made when first written to."""
    if folder := os.environ.get("FASTSPEC_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastspec"


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


_choices: dict[str, Choices] = {}


def choices(device: torch.device) -> Choices:
    """The choices for this device's model and these versions of the libraries."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = f"{__version__}-torch{torch.__version__}-triton{triton.__version__}"
    name = re.sub(r"[^\w.+-]+", "_", f"{model}-{versions}") + ".json"
    path = cache_dir() / name
    return _choices.setdefault(str(path), Choices(path))


# ------------------------------------------------------------------------------------------ choice


def measure(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of one call on a CUDA device, after two to compile and warm up."""
    with torch.cuda.device(device):
        for _ in range(2):
            call()
        times = []
        for _ in range(7):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def rule(candidates: Candidates[T], dtype: torch.dtype, k: int) -> str:
    """The choice without timing: fused where the projection rides along for free, else ATen's plan."""
    fused = k <= tiles.FUSED_RANK[tiles.kind(dtype)]
    return next((n for n in ("descriptors", "triton") if fused and n in candidates), "aten")


def choose(
    kind: str, candidates: Candidates[T], device: torch.device, dtype: torch.dtype, k: int
) -> str:
    """The candidate for this kind of call.

    A forced candidate that cannot serve this call (a wide rank, an input without a gradient) leaves it to
    the `rule`, with a warning.

    Raises:
        ValueError: FASTSPEC_BACKEND is none of `NAMES`.
    """
    forced = os.environ.get("FASTSPEC_BACKEND")
    if forced and forced not in NAMES:
        raise ValueError(f"FASTSPEC_BACKEND must be one of {', '.join(NAMES)}, got {forced!r}")
    if forced in candidates:
        return forced
    if forced:
        warnings.warn(f"FASTSPEC_BACKEND={forced} cannot serve: {kind}", stacklevel=2)
        return rule(candidates, dtype, k)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled() or capturing:
        return rule(candidates, dtype, k)
    known = choices(device)
    if known.known.get(kind) not in candidates:
        times = {name: measure(call, device) for name, call in candidates.items()}
        known.remember(kind, min(times, key=times.__getitem__))
    return known.known[kind]


def describe(direction: str, core: str, a: Tensor, d: int, out: int, k: int, *needs: bool) -> str:
    """The kind of a call, as the cache's key; row counts share one up to the next power of two."""
    rows = 1 << max(0, a.shape[0] - 1).bit_length()
    wants = "".join("01"[n] for n in needs)
    dtype = str(a.dtype).removeprefix("torch.")
    return f"{direction} {core} {dtype} {tiles.kind(a.dtype)} n{rows} {d}->{out} k{k} {wants}"


# ----------------------------------------------------------------------------------------- operators


def _kernels_serve(forward: str, gradient: str, k: int, *operands: Tensor) -> bool:
    """Whether Triton can take the call at all: one 16- or 32-bit dtype, rank, and a plan by p alone."""
    dtypes = {t.dtype for t in operands}
    return (
        forward in ("merged", "factored")
        and gradient in ("two_sided", "none")
        and len(dtypes) == 1
        and dtypes <= {torch.float32, torch.bfloat16, torch.float16}
        and k <= MAX_RANK
        and all(t.numel() for t in operands)
    )


def _descriptors_serve(a: Tensor, k: int, *operands: Tensor) -> bool:
    has_engine = tiles.capability(a.device) >= 90
    return has_engine and plain.fuses(a, k) and hopper.fits(a, *operands)


def spectral_linear(
    x: Tensor,  # [..., in]
    bias: Tensor | None,  # [out]
    weight: Tensor,  # [out, in]
    u: Tensor,  # [out, k]
    s: Tensor,  # [k]
    vh: Tensor,  # [k, in]
    delta: Tensor,
    core: str,
    forward: str,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """y [..., out] and p [N, k] (no rows where the plan saves none), as `aten.spectral_linear`."""
    (out, d), k = weight.shape, u.shape[1]
    x2 = x.reshape(-1, d)

    def planned(route: str) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: aten.spectral_linear(x, bias, weight, u, s, vh, delta, core, route, gradient)

    def fused(launch: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor]:
            y, p = launch(x2, weight, bias, u, vh, delta, core)
            kept = p if gradient == "two_sided" else x.new_empty((0, k))
            return y.view(*x.shape[:-1], out), kept

        return call

    candidates = {"aten": planned(forward)}
    if _kernels_serve(forward, gradient, k, x2, weight, u, vh):
        candidates["triton"] = fused(plain.spectral_linear_fwd)
        if _descriptors_serve(x2, k, weight, u, vh) and out * x.element_size() % 16 == 0:
            candidates["descriptors"] = fused(hopper.spectral_linear_fwd)
        if x.dtype == torch.float32 and forward != "merged":
            candidates["merged"] = planned("merged")
    kind = describe("fwd", core, x2, d, out, k, gradient == "two_sided", bias is not None)
    return candidates[choose(kind, candidates, x.device, x.dtype, k)]()


def spectral_linear_backward(
    g: Tensor,  # [..., out]
    x: Tensor | None,
    p: Tensor | None,  # [N, k]
    weight: Tensor,  # [out, in]
    u: Tensor,  # [out, k]
    s: Tensor,  # [k]
    vh: Tensor,  # [k, in]
    delta: Tensor,
    core: str,
    forward: str,
    gradient: str,
    needs_dx: bool,
    needs_delta: bool,
) -> tuple[Tensor, Tensor]:
    """dx [..., in] and d delta; as `aten.spectral_linear_backward` gives them: empty where not needed."""
    (out, d), k = weight.shape, u.shape[1]
    g2 = g.reshape(-1, out)
    factors = (weight, u, s, vh, delta, core)

    def planned(route: str, delta_too: bool) -> tuple[Tensor, Tensor]:
        return aten.spectral_linear_backward(
            g, x, p, *factors, route, gradient, needs_dx, delta_too
        )

    def returned(dx: Tensor | None, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        shaped = g.new_empty(0) if dx is None else dx.view(*g.shape[:-1], d)
        return shaped, delta.new_empty(0) if grad is None else grad

    def triton_fused() -> tuple[Tensor, Tensor]:
        launch = plain.spectral_linear_bwd
        operands = (g2, saved, weight, u, vh, delta, core)
        return returned(*launch(*operands, needs_dx=needs_dx, needs_delta=needs_delta))

    def descriptors() -> tuple[Tensor, Tensor]:
        operands = (g2, saved, weight, u, vh, delta, core)
        return returned(*hopper.spectral_linear_bwd(*operands, needs_delta=needs_delta))

    def merged() -> tuple[Tensor, Tensor]:
        dx = planned("merged", False)[0]
        if not needs_delta:
            return dx, delta.new_empty(0)
        return dx, sigma_grad(g2, u, saved, core, half_width=delta.shape[0] // 2)

    candidates = {"aten": lambda: planned(forward, needs_delta)}
    saved = g2 if p is None else p  # without a coefficient gradient p is not read
    has_p = p is not None or not needs_delta
    if has_p and _kernels_serve(forward, gradient, k, g2, weight, u, vh):
        candidates["triton"] = triton_fused
        if needs_dx and _descriptors_serve(g2, k, weight, u, vh) and d * g.element_size() % 16 == 0:
            candidates["descriptors"] = descriptors
        if needs_dx and g.dtype == torch.float32:
            candidates["merged"] = merged
    kind = describe("bwd", core, g2, d, out, k, needs_dx, needs_delta)
    return candidates[choose(kind, candidates, g.device, g.dtype, k)]()
