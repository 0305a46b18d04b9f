"""What is asked of a run on a card: each bar, the aim behind it, and what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]
OURS = "fastspec"
KEPT = "fastspec, copies kept"  # of every adapted weight
SVD, LOWRANK = "torch.linalg.svd", "svd_lowrank niter=4"
PEERS = ("PEFT LoRA r8", "EigenTune", "full finetuning")
LAYERS = {
    "768->768 n=4096": (1.20, 1.08),
    "768->3072 n=4096": (1.20, 1.08),
    "3072->768 n=4096": (1.20, 1.08),
    "4096->4096 n=8192": (1.08, 1.03),
    "4096->14336 n=8192": (1.08, 1.03),
}
STEPS = {
    "MiniLM 32x64": (1.15, 1.07),
    "BERT-base 32x128": (1.12, 1.05),
    "8B-like 4x2048": (1.06, 1.03),
}
STACKS = ("MiniLM k=32", "BERT-base k=32")
EIGH = ("eigh of 500 of order 100", "eigh of 4096 of order 64")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A measurement (None: not there), what it must reach and should reach, and in which direction."""

    name: str
    value: float | None
    must: float
    aim: float
    least: bool = False  # whether larger is better

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        for limit, verdict in ((self.aim, "aim met"), (self.must, "met")):
            if self.value >= limit if self.least else self.value <= limit:
                return verdict
        return "missed"


def bars(steps: Mapping[str, Rows]) -> Iterator[Bar]:
    """Every bar, by the rows of the steps."""
    for step in ("correctness", "sanitizer"):
        rows = steps.get(step)
        failed = None if not rows else float(sum("error" in row for row in rows.values()))
        yield Bar(f"{step}: failures", failed, 0, 0)
    layers = steps.get("layers", {})
    for name, limits in LAYERS.items():
        row = layers.get(f"{name} k=32 diag bf16 step", {})
        what = f"layer step over the frozen layer, {name}"
        yield Bar(what, at(row, "chosen", "ratio"), *limits)
        yield Bar(f"{what}, copy kept", at(row, "kept", "ratio"), *limits)
        yield Bar(f"{what}, copy kept and joined", at(row, "joined", "ratio"), *limits)
    whole = {**steps.get("steps", {}), **steps.get("compiled", {})}
    for name, limits in STEPS.items():
        for which, note in ((OURS, ""), (KEPT, ", copies kept")):
            value = at(whole.get(f"{name} graphed", {}), "ratios", which)
            yield Bar(f"step over the frozen floor, {name}, graphed{note}", value, *limits)
    for name in STEPS:
        for how in ("eager", "graphed", "compiled", "compiled graphed"):
            ratios = {**at_all(whole, f"{name} {how}, others"), **at_all(whole, f"{name} {how}")}
            for peer in PEERS if how in ("eager", "graphed") else PEERS[:2]:
                yield Bar(
                    f"{peer} over ours, {name}, {how}", over(ratios, peer, OURS), 1, 1.2, least=True
                )
    for name in STEPS:
        row = whole.get(f"{name} memory", {})
        above, p = at(row, "above_the_floor_mb", OURS), row.get("p_of_all_layers_mb")
        share = None if above is None or not p else above / p
        yield Bar(f"peak memory above the floor's over p of all layers, {name}", share, 1.05, 1.05)
    yield from _svd(steps.get("svd", {}))
    tasks = steps.get("tasks", {})
    for name in ("MiniLM 32x64", "BERT-base 32x64", "MiniLM 1024x64"):
        for how in ("eager", "graphed"):
            ratio = at(tasks.get(f"{name} {how}", {}), "ratios", "every row its own task")
            yield Bar(f"1,024 tasks over the unadapted forward, {name}, {how}", ratio, 1.15, 1.05)


def _svd(rows: Rows) -> Iterator[Bar]:
    for name in STACKS:
        ms = {peer: row["ms"] for peer, row in rows.get(name, {}).items() if isinstance(row, dict)}
        yield Bar(f"{SVD} over ours, {name}", over(ms, SVD, OURS), 5, 20, least=True)
        yield Bar(f"ours over {LOWRANK}, {name}", over(ms, OURS, LOWRANK), 2, 1)
    for name in EIGH:
        ms = {peer: row["ms"] for peer, row in rows.get(name, {}).items() if isinstance(row, dict)}
        torch_over = over(ms, "torch.linalg.eigh", OURS)
        yield Bar(f"torch over ours, {name}", torch_over, 1, 5, least=True)
        yield Bar(f"CuPy over ours, {name}", over(ms, "CuPy", OURS), 1, 1, least=True)


def at(row: Mapping[str, Any], *keys: str) -> float | None:
    """A figure of nested ones, None where it is not there."""
    found: Any = row
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, (int, float)) else None


def at_all(rows: Rows, name: str) -> Mapping[str, float]:
    return rows.get(name, {}).get("ratios", {})


def over(figures: Mapping[str, float], a: str, b: str) -> float | None:
    return figures[a] / figures[b] if a in figures and b in figures else None
