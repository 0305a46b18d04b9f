"""topk_svd of stacks against the peers: the answer is checked first, then time is taken interleaved."""

import gc
import statistics
import time
from contextlib import contextmanager

import harness
import pytest
import svd_problems
import torch

from fastspec import _extension

TOL = 1e-5


@contextmanager
def python_path():
    """topk_svd as it runs where csrc/ was not built."""
    original = _extension.unavailable_reason
    _extension.unavailable_reason = lambda: "hidden by the benchmark"
    try:
        yield
    finally:
        _extension.unavailable_reason = original


def on_python_path(w, k):
    with python_path():
        return svd_problems.triplets_of_topk(w, k)


def candidates() -> dict:
    ours = {"topk_svd, ATen": on_python_path}
    if _extension.unavailable_reason() is None:
        ours["topk_svd, csrc"] = svd_problems.triplets_of_topk
    return ours | svd_problems.PEERS


@pytest.mark.parametrize("name", svd_problems.STACKS)
def test_svd(name: str, rounds, show) -> None:
    stack = svd_problems.STACKS[name]
    w = stack.build()
    runs = candidates()
    residuals = {c: svd_problems.residual(w, *run(w, stack.k)) for c, run in runs.items()}
    for ours in (c for c in runs if c.startswith("topk_svd")):
        assert residuals[ours] <= TOL

    times: dict[str, list[float]] = {c: [] for c in runs}
    gc.collect()
    for _ in range(rounds(5)):
        for candidate, run in runs.items():
            start = time.perf_counter()
            run(w, stack.k)
            times[candidate].append(time.perf_counter() - start)
    reference = times["torch.linalg.svd"]
    # ratios within a round: the machine drifts between rounds
    faster = {
        c: statistics.median(a / b for a, b in zip(reference, own, strict=True))
        for c, own in times.items()
    }
    lines = [f"\n{name}, k={stack.k}, {torch.get_num_threads()} threads"]
    for c in sorted(runs, key=lambda c: -faster[c]):
        lines.append(f"  {c:22} residual {residuals[c]:.0e}  {faster[c]:6.2f}x as fast as svd")
    show("\n".join(lines))
    harness.store(
        "svd-" + name.replace(" ", "-"), {"k": stack.k, "faster": faster, "residual": residuals}
    )
    best = max(faster[c] for c in runs if c.startswith("topk_svd"))
    assert best >= stack.bar, f"{best:.2f}x against a bar of {stack.bar}x"
