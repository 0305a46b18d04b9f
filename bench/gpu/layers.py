"""Single layers: every candidate over the frozen layer, inside CUDA graphs, past the L2 cache.

First all answers are checked, in several processes, which also compiles what is then timed. A layer's
operands are several sets, larger together than the cache; a graph holds one call on each. Beside the
measured ratio stands the one that flops and bytes predict from the ceilings of the step `versions`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from typing import Any

import harness
import torch
import torch.nn.functional as F
from kernel_problems import problem
from support import relative_error

from fastspec.kernels import choice
from fastspec.kernels.merge import merge
from gpu import device, record, workers
from gpu.calls import CHOSEN, JOINED, KEPT, errors, forced, pair, tf32, tolerance
from gpu.device import DEVICE, pick
from gpu.record import Record

# Triton's interpreter multiplies bfloat16 as integers
BF16, FP32 = pick(torch.bfloat16, torch.float16), torch.float32
PROCESSES = pick(12, 2)
ROUNDS = pick(9, 1)
PATIENCE = pick(60, 600)  # seconds for the answers of one layer
MOST_SETS = pick(32, 2)
CHECKS = 0.45  # share of the time for the answers


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer and batch: `n` rows of `d` inputs to `out` outputs, rank `k`."""

    n: int
    d: int
    out: int
    k: int = 32
    core: str = "diag"
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        kind = "bf16" if self.dtype == BF16 else "tf32"
        return f"{self.d}->{self.out} n={self.n} k={self.k} {self.core} {kind}"


def grid() -> list[Layer]:
    """The layers, those with a bar first, then by how much they tell."""
    if device.REHEARSING:
        return [
            Layer(40, 48, 32, 16),
            Layer(17, 32, 48, 8, "dense"),
            Layer(33, 32, 32, 8, dtype=FP32),
        ]
    base = [(768, 768), (768, 3072), (3072, 768)]
    large = [(4096, 4096), (4096, 14336), (14336, 4096)]
    small = [(384, 384), (384, 1536), (1536, 384)]
    found = [Layer(4096, *size) for size in base]
    found += [Layer(8192, *size) for size in large]
    found += [Layer(8192, 2048, 2048)]  # where cuBLAS's lead begins
    found += [Layer(2048, *size) for size in small]
    found += [Layer(n, 768, 768) for n in (8, 512, 16384)]
    found += [Layer(n, 4096, 4096) for n in (8, 512, 16384)]
    found += [Layer(4096, 768, 3072, core=core) for core in ("dense", "band")]
    found += [Layer(8192, 4096, 4096, core=core) for core in ("dense", "band")]
    found += [Layer(4096, 768, 768, k) for k in (8, 64, 128, 256)]
    found += [Layer(8192, 4096, 4096, k) for k in (8, 64, 128, 256)]
    found += [Layer(4096, *size, dtype=FP32) for size in base]
    found += [Layer(8192, 4096, 4096, dtype=FP32), Layer(8, 4096, 14336), Layer(8, 14336, 4096)]
    return found


def check(index: int) -> dict[str, Any]:
    """The errors of every candidate that can serve a layer of the grid."""
    layer = grid()[index]
    found: dict[str, Any] = {}
    with tf32(layer.dtype == FP32):
        t = problem(layer.n, layer.d, layer.out, layer.k, layer.core, layer.dtype, device=DEVICE)
        kept = [KEPT, JOINED] if layer.dtype == BF16 and layer.core != "band" else []
        for name in (*choice.NAMES, *kept):
            try:
                found[name] = max(errors(t, layer.core, name).values())
            except ValueError as error:
                if "cannot serve" not in str(error):
                    raise
        limit = tolerance(layer.dtype)
    device.free()
    return {"errors": found, "limit": limit}


def checked(rows: Record) -> dict[int, list[str]]:
    """Which candidates are right, by the index of their layer."""
    right: dict[int, list[str]] = {}

    def answered(index: int, result: dict[str, Any]) -> None:
        name = f"{grid()[index]}: answers"
        if "errors" not in result:
            if "error" in result:
                rows.fail(name, result["error"])
            return
        right[index] = [n for n, e in result["errors"].items() if e <= result["limit"]]
        wrong = {n: e for n, e in result["errors"].items() if n not in right[index]}
        if wrong:
            rows.fail(name, f"over {result['limit']}: {wrong}")
        else:
            right[index].insert(0, CHOSEN)  # one of these, whichever it is
            rows.add(name, **result)

    seconds = record.left()
    ends = time.time() + CHECKS * seconds
    workers.run("gpu.layers", range(len(grid())), PROCESSES, PATIENCE, answered, ends)
    return right


def sets(layer: Layer) -> list[dict]:
    """Operands, each set of other values, so many that the cache can't hold them."""
    size = layer.dtype.itemsize
    each = size * (2 * layer.n * (layer.d + layer.out) + layer.d * layer.out)
    count = max(2, min(MOST_SETS, -(-3 * device.cache_bytes() // each)))
    return [operands(layer, seed) for seed in range(count)]


def operands(layer: Layer, seed: int) -> dict:
    """As `kernel_problems.problem`, drawn in float32 on the device."""
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = layer.dtype) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=g, device=DEVICE)
        return (drawn * scale).to(dtype)

    k = layer.k
    shape = {"diag": (k,), "band": (3, k), "dense": (k, k)}[layer.core]
    return {
        "x": normal(layer.n, layer.d),
        "g": normal(layer.n, layer.out),
        "w": normal(layer.out, layer.d, scale=layer.d**-0.5),
        "bias": normal(layer.out),
        "u": normal(layer.out, k, scale=layer.out**-0.5),
        "vh": normal(k, layer.d, scale=layer.d**-0.5),
        "delta": normal(*shape, scale=1e-2, dtype=torch.float32),
    }


def frozen(t: dict) -> tuple:
    """The frozen layer's forward and backward."""
    return lambda: (F.linear(t["x"], t["w"], t["bias"]), None), lambda p: (t["g"] @ t["w"],)


def in_graph(everything: list[dict], core: str, name: str | None, phase: str) -> device.Step:
    """A graph of one pass of a candidate (None: the frozen layer) over all sets.

    Every result has memory of its own, as in a model.
    """

    def step() -> list:
        kept: list[Any] = []
        with forced(name) if name else contextlib.nullcontext():
            for (forward, backward), p in zip(pairs, saved, strict=True):
                if phase != "backward":
                    kept.append(forward())
                if phase != "forward":
                    kept.append(backward(kept[-1][1] if phase == "step" else p))
        return kept

    with forced(name) if name else contextlib.nullcontext():
        pairs = [frozen(t) if name is None else pair(t, core, name) for t in everything]
        saved = [forward()[1] for forward, _ in pairs]
    return device.graphed(step, launches=True)


def work(layer: Layer, phase: str, adapted: bool) -> tuple[float, float]:
    """(flops, bytes) with each operand moved once; a backward moves and multiplies as a forward does."""
    n, d, out, k, size = layer.n, layer.d, layer.out, layer.k, layer.dtype.itemsize
    times = 2 if phase == "step" else 1
    flops = 2.0 * n * d * out
    moved = float(size * (n * d + out * d + n * out))
    if adapted:
        flops += 2.0 * n * k * (d + out)
        moved += size * k * (n + d + out)
    return times * flops, times * moved


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """(flop/s, byte/s) as measured by the step `versions`, else an H100's by its data sheet."""
    found = record.read()["steps"].get("versions", {})
    product = found.get("bf16 product" if dtype == BF16 else "tf32 product", {})
    flops = product.get("tflops", 989.0 if dtype == BF16 else 494.0)
    return 1e12 * flops, 1e9 * found.get("copy", {}).get("gb_per_s", 3350.0)


def measure(layer: Layer, names: list[str], rows: Record) -> None:
    everything = sets(layer)
    top = ceilings(layer.dtype)

    def least(phase: str, adapted: bool) -> float:
        flops, moved = work(layer, phase, adapted)
        return max(flops / top[0], moved / top[1])

    for phase in ("forward", "backward", "step"):
        floor = in_graph(everything, layer.core, None, phase)
        steps = {name: in_graph(everything, layer.core, name, phase) for name in names}
        timing = harness.pairwise(floor, steps, ROUNDS, warmup=2, clock=device.on_device)
        flops, moved = work(layer, phase, True)
        figures: dict[str, Any] = {}
        for name in names:
            ratio = timing.ratios[name]
            ms = ratio.median * timing.floor_ms / len(everything)
            figures[name] = {
                "ratio": ratio.median, "low": ratio.low, "high": ratio.high, "us": 1e3 * ms,
                "tflops": flops / ms / 1e9, "gb_per_s": moved / ms / 1e6,
            }  # fmt: skip
        rows.add(
            f"{layer} {phase}",
            predicted=least(phase, True) / least(phase, False),
            predicted_us=1e6 * least(phase, True),
            frozen_us=1e3 * timing.floor_ms / len(everything),
            noise=timing.noise,
            sets=len(everything),
            **figures,
        )
        del floor, steps
        device.free()


def merging(count: int, rows: Record) -> None:
    """One launch for a stack of layers, over an `addmm` for each."""
    size, dtype = pick((1, 768, 768, 32), (1, 16, 16, 4)), pick(BF16, FP32)
    stack = [problem(*size, "diag", dtype, seed, DEVICE) for seed in range(count)]
    operands = [[t[name] for t in stack] for name in ("w", "u", "vh", "delta")]

    def one_by_one() -> list:
        return [
            torch.addmm(w, (u * d).to(dtype), vh) for w, u, vh, d in zip(*operands, strict=True)
        ]

    for got, want in zip(merge(*operands), one_by_one(), strict=True):
        if not relative_error(got, want) <= tolerance(dtype):
            raise AssertionError(f"merging is off by {relative_error(got, want):.1e}")
    # it copies a table of addresses to the device, which a graph does not take
    one_launch = {"one launch": lambda: merge(*operands)}
    timing = harness.pairwise(one_by_one, one_launch, ROUNDS, clock=device.wall)
    ratio = timing.ratios["one launch"].median
    rows.add(
        f"merging {count} layers", addmm_ms=timing.floor_ms, noise=timing.noise, one_launch=ratio
    )


def main() -> int:
    rows = Record("layers")
    right = checked(rows)
    for index, layer in enumerate(grid()):
        names = right.get(index, [])
        if names and rows.enough(3, str(layer)):
            with rows.row(str(layer)), tf32(layer.dtype == FP32):
                measure(layer, names, rows)
    for count in pick((1, 24), (2,)):
        with rows.row(f"merging {count} layers"):
            merging(count, rows)
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
