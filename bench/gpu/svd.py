"""Top-k SVD of stacks of weights, and batched symmetric eigenproblems, against torch and CuPy."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import svd_problems
import torch
from svd_problems import LOWRANK, SVD
from torch import Tensor

import fastspec
from gpu import device
from gpu.calls import jacobi_eigh
from gpu.device import DEVICE, pick
from gpu.record import Record

OURS = "fastspec"
CUPY = "CuPy"
TOL = 1e-5
SLOW = 0.5  # seconds: what takes longer is run once
ROUNDS = pick(5, 2)
# name, rank, stacks (matrices, rows, columns), matrices of a stack for peers that loop
PROBLEMS: list[tuple[str, int, list[tuple[int, int, int]], int]] = pick(
    [
        ("MiniLM", 32, [(24, 384, 384), (6, 1536, 384), (6, 384, 1536)], 2),
        ("BERT-base", 32, [(48, 768, 768), (12, 3072, 768), (12, 768, 3072)], 1),
        ("4096x4096", 64, [(1, 4096, 4096)], 1),
        ("14336x4096", 64, [(1, 14336, 4096)], 1),
    ],
    [("MiniLM", 4, [(3, 24, 24), (2, 40, 24)], 1)],
)
EIGH = pick([(500, 100), (4096, 64), (64, 256)], [(3, 8)])

Triplets = tuple[Tensor, Tensor, Tensor]


def cupy() -> Any:
    """CuPy, or None where it is not installed."""
    try:
        import cupy as module
    except ImportError:
        return None
    return module


def ours(w: Tensor, k: int) -> Triplets:
    return svd_problems.triplets_of_topk(w, k, TOL)


def by_cupy(w: Tensor, k: int) -> Triplets:
    found = cupy().linalg.svd(cupy().from_dlpack(w.contiguous()), full_matrices=False)
    u, s, vh = (torch.from_dlpack(part) for part in found)
    return u[..., :k], s[..., :k], vh[..., :k, :]


def once(run: Callable[[], object]) -> tuple[float, Any]:
    """Median seconds of some runs, one where it is slow, and the last result."""
    kept: list[Any] = []

    def step() -> None:
        kept[:] = [run()]

    times = [device.wall(step)]
    if times[0] < SLOW:
        times = [device.wall(step) for _ in range(ROUNDS)]  # the first one warmed up
    return statistics.median(times), kept[0]


def factorise(
    name: str,
    k: int,
    run: Callable[[Tensor, int], Triplets],
    stacks: list[Tensor],
    sample: int | None,
) -> dict[str, Any]:
    """Milliseconds for all stacks, scaled where only a sample of each was factorised, and the residual."""
    small = torch.randn(2, pick(64, 20), pick(48, 16), device=DEVICE)
    run(small, 4)  # loads libraries
    seconds, residual = 0.0, 0.0
    for w in stacks:
        part = w if sample is None else w[:sample]
        taken, found = once(lambda part=part: run(part, k))  # type: ignore[misc]
        seconds += taken * len(w) / len(part)
        residual = max(residual, svd_problems.residual(part, *found))
    scaled = sample is not None and any(sample < len(w) for w in stacks)
    return {"ms": 1e3 * seconds, "residual": residual, "scaled": scaled}


def topk(rows: Record) -> None:
    compiled = fastspec.backends()["extension_cuda"].available
    for name, k, sizes, sample in PROBLEMS:
        stacks = [svd_problems.slow_decay(*size, device=DEVICE)[0] for size in sizes]
        peers: dict[str, tuple[Callable[[Tensor, int], Triplets], int | None]] = {
            OURS: (ours, None),
            LOWRANK: (svd_problems.PEERS[LOWRANK].run, None),
            SVD: (svd_problems.PEERS[SVD].run, sample),
        }
        if cupy() is not None:
            peers[CUPY] = (by_cupy, sample)
        found: dict[str, Any] = {}
        for peer, (run, part) in peers.items():
            with rows.row(f"{name} k={k} {peer}"):
                if rows.enough(pick(6, 0), f"{name} k={k} {peer}"):
                    found[peer] = factorise(name, k, run, stacks, part)
                    rows.add(f"{name} k={k}", compiled=compiled, **found)  # anew with every peer
        if OURS in found and found[OURS]["residual"] > TOL:
            rows.fail(f"{name} k={k} residual", f"{found[OURS]['residual']} above {TOL}")
        del stacks
        device.free()


def eigh(rows: Record) -> None:
    for count, order in EIGH:
        name = f"eigh of {count} of order {order}"
        a = torch.randn(count, order, order, device=DEVICE)
        a = a + a.mT
        runs: dict[str, Callable[[Tensor], Any]] = {
            OURS: lambda a: jacobi_eigh()(a),
            "torch.linalg.eigh": torch.linalg.eigh,
        }
        if cupy() is not None:
            runs[CUPY] = lambda a: cupy().linalg.eigh(cupy().from_dlpack(a))
        found: dict[str, Any] = {}
        for peer, run in runs.items():
            if not rows.enough(pick(4, 0), f"{name} {peer}"):
                continue
            with rows.row(f"{name} {peer}"):
                run(a[:2])  # loads libraries
                seconds, pair = once(lambda run=run, a=a: run(a))  # type: ignore[misc]
                values, v = (torch.from_dlpack(part) for part in pair)
                off = (a @ v - v * values[:, None]).norm() / a.norm()
                found[peer] = {"ms": 1e3 * seconds, "residual": float(off)}
                rows.add(name, **found)


def main() -> int:
    rows = Record("svd")
    eigh(rows)
    topk(rows)
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
