"""Pairwise timing: every candidate's step over the mean of the floor's steps just before and just after it.

Machines drift and share their caches, so a figure is the median of such ratios over many rounds, and the
floor measured against itself in the same way is the noise. Absolute times are kept for the record alone.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from fastspec.files import write_json

RESULTS = Path(__file__).parent / "results"
MAX_NOISE = 0.03
FLOOR = "floor"
SELDOM = 3  # rounds to one of a peer that is far off


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A candidate's time over the floor's: median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:6.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Ratios by candidate, the floor's own among them, and the floor's median time in ms."""

    ratios: dict[str, Ratio]
    floor_ms: float
    rounds: int

    @property
    def noise(self) -> float:
        """How far the floor is from itself."""
        return abs(self.ratios[FLOOR].median - 1)

    @property
    def counts(self) -> bool:
        return self.noise <= MAX_NOISE


def pairwise(
    floor: Callable[[], object],
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    seldom: Sequence[str] = (),
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> Timing:
    """Time `candidates` against `floor`.

    Those named in `seldom` take part in every third round alone: far from the others, they need fewer.
    `clock` runs a step and returns its seconds; the default is wall time, for which the callables must
    synchronise on a GPU.
    """
    clock = clock or _seconds
    steps = {FLOOR: floor, **candidates}
    for _ in range(warmup):
        for step in steps.values():
            step()
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        before = clock(floor)
        floors = [before]
        for i in range(rounds):
            for name, step in steps.items():
                if name in seldom and i % SELDOM:
                    continue
                own = clock(step)
                after = clock(floor)
                ratios[name].append(2 * own / (before + after))
                floors.append(after)
                before = after
    finally:
        gc.enable()
    return Timing(
        {name: _summary(values) for name, values in ratios.items()},
        1e3 * statistics.median(floors),
        rounds,
    )


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _summary(values: list[float]) -> Ratio:
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return Ratio(median, low, high)


def table(title: str, timing: Timing) -> str:
    """The ratios as text, best first."""
    lines = [
        f"\n{title}",
        f"  noise (the floor against itself): {100 * timing.noise:.1f} %"
        + ("" if timing.counts else f"; above {100 * MAX_NOISE:.0f} %: this run does not count"),
    ]
    for name, ratio in sorted(timing.ratios.items(), key=lambda item: item[1].median):
        lines.append(f"  {name:28} {ratio}")
    return "\n".join(lines)


def draw(name: str, title: str, timing: Timing, bars: Mapping[str, float]) -> Path | None:
    """The ratios as a picture, bench/results/<name>.png, best on top; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ratios = sorted(timing.ratios.items(), key=lambda item: -item[1].median)
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.34 * len(ratios)), layout="constrained")
    for y, (label, r) in enumerate(ratios):
        ours = label in bars
        axes.barh(y, r.median, color="tab:blue" if ours else "0.75", height=0.7)
        axes.plot([r.low, r.high], [y, y], color="black", linewidth=1)
        axes.annotate(
            f"{r.median:.3f}", (max(r.high, r.median), y), (4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
        if ours:
            axes.plot([bars[label]] * 2, [y - 0.45, y + 0.45], color="tab:red", linewidth=2)
    axes.set_yticks(range(len(ratios)), [label for label, _ in ratios])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(left=min(0.9, *(r.low for _, r in ratios)))
    axes.set_xlabel("time over the frozen model's (median, quartiles; red: our bar)")
    axes.set_title(title, fontsize=10)
    path = RESULTS / f"{name}.png"
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)
    return path


def store(name: str, value: object) -> Path:
    """Write one measurement, with what is needed to read it later, to bench/results/<name>.json."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"machine": machine(), "result": value})
    return path


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["result"]


def machine() -> dict[str, object]:
    """What the figures depend on, without naming the machine."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
