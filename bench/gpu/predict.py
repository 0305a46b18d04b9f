"""What whole training steps in a CUDA graph should take over the frozen floor, candidate by candidate.

PYTHONPATH=.:bench python -m gpu.predict

A step is its floor and what a candidate adds to it: launches, thin products, wider products, passes over
memory. What was measured is taken from the results of an H200: floors, frozen layers, thin and joined
products, the three launches that a coefficient gradient was. What was not is the constants below. For an H100
products are scaled by the arithmetic and all else by the bandwidth. Nothing here is a measurement.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu.tables import table

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu"
K, SIZE = 32, 2  # rank; bytes of a number
LAUNCH = 1.5  # us, of a small kernel in a graph beyond the end of the one before
LATENCY = 0.8  # us: to read from memory, or from another multiprocessor, once
ALONE = 5.0  # us of one layer's compare-and-remake beyond its bytes; as the steps of h200-3 say
STRIDED = 0.3  # of a pass over y or dx: what it costs others to read rows that lie apart; a guess


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    tflops: float  # dense bfloat16, as products reach it
    bandwidth: float  # bytes a microsecond

    def product(self, measured: float) -> float:
        return measured * H200.tflops / self.tflops

    def moved(self, measured: float) -> float:
        return measured * H200.bandwidth / self.bandwidth

    def passes(self, numbers: float) -> float:
        return numbers * SIZE / self.bandwidth


H200 = Chip("H200", 790, 4.25e6)
H100 = Chip("H100", 800, 3.0e6)


@dataclasses.dataclass(frozen=True)
class Layer:
    n: int
    d: int
    out: int
    times: int  # of them in a block
    shared: int = 1  # how many of them are called on the same x

    @property
    def row(self) -> str:
        return f"{self.d}->{self.out} n={self.n} k={K} diag bf16"


@dataclasses.dataclass(frozen=True)
class Load:
    name: str
    blocks: int
    layers: tuple[Layer, ...]
    floor: str  # the row of the step `steps` that has it


def encoder(name: str, n: int, width: int, blocks: int) -> Load:
    square = (Layer(n, width, width, 3, shared=3), Layer(n, width, width, 1))
    wide = (Layer(n, width, 4 * width, 1), Layer(n, 4 * width, width, 1))
    return Load(name, blocks, square + wide, f"{name} graphed")


LOADS = (
    encoder("MiniLM 32x64", 2048, 384, 6),
    encoder("BERT-base 32x128", 4096, 768, 12),
    Load(
        "8B-like 4x2048", 2,
        (
            Layer(8192, 4096, 4096, 1, shared=3), Layer(8192, 4096, 1024, 2, shared=3),
            Layer(8192, 4096, 4096, 1), Layer(8192, 4096, 14336, 2), Layer(8192, 14336, 4096, 1),
        ),
        "8B-like 4x2048 eager",  # a graph of it was not measured; the device is the bound
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Kept copies with these parts; none at all is what the kernels of one layer do."""

    name: str
    one_launch: bool = False
    at_once: bool = False
    joined: tuple[str, ...] = ()
    shared: bool = False


CANDIDATES = (
    Candidate("copies kept, as h200-3 measured them"),
    Candidate("gradient in one launch", True),
    Candidate("and copies made at once", True, True),
    Candidate("and dx joined", True, True, ("dx",)),
    Candidate("and y joined", True, True, ("dx", "y")),
    Candidate("and query, key, value shared", True, True, ("dx", "y"), True),
)


@functools.cache
def measured() -> Mapping[str, Any]:
    """The rows of the steps `layers` and `steps`, and of `tune`."""
    third = json.loads((RESULTS / "h200-3.json").read_text())["steps"]
    tuned = json.loads((RESULTS / "h200-2-tune.json").read_text())["steps"]["tune"]
    return {"layers": third["layers"], "steps": third["steps"], "tune": tuned}


def thin(columns: int, n: int) -> float:
    """x Vh^T or g U on an H200: a line through what was measured, over the bytes of the wide operand."""
    points = []
    for name, row in measured()["tune"].items():
        for part, side in (("y, p = x Vh^T", 0), ("dx, q = g U", 1)):
            if part in row.get("ratios", {}):
                sizes = name.split()
                wide = int(sizes[0].split("->")[side])
                points.append((wide * int(sizes[1][2:]), row["ratios"][part] * row["frozen_us"]))
    count = len(points)
    x, y = (sum(p[i] for p in points) / count for i in (0, 1))
    slope = sum((p[0] - x) * (p[1] - y) for p in points) / sum((p[0] - x) ** 2 for p in points)
    return y + slope * (columns * n - x)


def frozen(layer: Layer, way: str) -> float:
    """One product of the frozen layer; where it was not measured, by its arithmetic."""
    row = measured()["layers"].get(f"{layer.row} {way}")
    return row["frozen_us"] if row else 2e-6 * layer.n * layer.d * layer.out / H200.tflops


def widened(layer: Layer, way: str) -> float:
    """What a factor beside W adds to a product."""
    row = measured()["tune"].get(f"{layer.row} {way}", {})
    found = [r for part, r in row.get("ratios", {}).items() if part.endswith("in one product")]
    share = found[0] - 1 if found else K / (layer.d if way == "dx" else layer.out)
    return share * frozen(layer, "backward" if way == "dx" else "forward")


def three_launches(layer: Layer) -> float:
    """The coefficient gradient by ATen: what a kept copy's backward took beyond its products."""
    row = measured()["layers"].get(f"{layer.row} backward")
    if row is None:
        row = measured()["layers"]["4096->4096 n=8192 k=32 diag bf16 backward"]
        layer = Layer(8192, 4096, 4096, 1)
    return (row["kept"]["ratio"] - 1) * row["frozen_us"] - thin(layer.out, layer.n)


def added(layer: Layer, what: Candidate, chip: Chip) -> dict[str, float]:
    """Microseconds that one layer adds to its frozen one's, by what they go to."""
    n, d, out = layer.n, layer.d, layer.out
    group = layer.shared if what.shared else 1
    copy_p = (LAUNCH + LATENCY + chip.passes(2 * n * K)) / group
    found = dict.fromkeys(("p", "q", "gradient", "copies", "rows apart", "dx added up"), 0.0)
    if "y" in what.joined and out <= d:
        found["p"] = chip.product(widened(layer, "y")) + copy_p
        found["rows apart"] += STRIDED * chip.passes(n * out)
    else:
        found["p"] = chip.moved(thin(d, n))
    if "dx" in what.joined and d <= out:
        found["q"] = group * chip.product(widened(layer, "dx"))
        found["rows apart"] += STRIDED * chip.passes(n * d) / group
    else:
        found["q"] = chip.moved(thin(out, n))
    if what.one_launch:
        found["gradient"] = (LAUNCH + 3 * LATENCY) / group + chip.passes(2 * n * K)
    else:
        found["gradient"] = three_launches(layer)
    found["copies"] = chip.passes(2 * d * out) + (0.0 if what.at_once else ALONE)
    if group > 1:  # all but one of the frozen layers' dx are added by a kernel, which is saved
        saved = LAUNCH + chip.passes(3 * n * d) - chip.passes(n * d)
        found["dx added up"] = -saved * (group - 1) / group
    return found


def step(load: Load, what: Candidate, chip: Chip) -> tuple[float, float, str]:
    """Milliseconds of the floor and of the step, and where most of the difference goes."""
    floor = 1e3 * measured()["steps"][load.floor]["floor_ms"]
    products = load.blocks * sum(
        layer.times * (frozen(layer, "forward") + frozen(layer, "backward"))
        for layer in load.layers
    )
    floor = chip.product(products) + chip.moved(floor - products)
    totals: dict[str, float] = {}
    for layer in load.layers:
        for name, us in added(layer, what, chip).items():
            totals[name] = totals.get(name, 0.0) + load.blocks * layer.times * us
    if what.at_once:
        kinds = len({(layer.d, layer.out) for layer in load.layers}) + 1
        totals["copies"] += kinds * (LAUNCH + LATENCY)
    most = sorted(totals, key=lambda name: -abs(totals[name]))[:3]
    bound = ", ".join(f"{name} {totals[name] / floor:+.3f}" for name in most)
    return floor / 1e3, (floor + sum(totals.values())) / 1e3, bound


def rows() -> Iterator[list[str]]:
    for load in LOADS:
        for chip in (H200, H100):
            for what in CANDIDATES:
                floor, ms, bound = step(load, what, chip)
                yield [load.name, chip.name, what.name, f"{floor:.3g}", f"{ms / floor:.3f}", bound]


def main() -> int:
    header = [
        "step",
        "card",
        "candidate",
        "floor, ms",
        "predicted over it",
        "most of the difference",
    ]
    print(table(header, list(rows())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
