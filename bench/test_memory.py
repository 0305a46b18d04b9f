"""Memory of a training step against the frozen model's: saved activations and the peak (F1, F2)."""

import harness
import pytest
import torch
from models import PEERS, Step, Workload, build, floor, spectral
from torch.profiler import ProfilerActivity, profile

from fastspec.model.targets import spectral_layers

LOADS = [
    pytest.param(Workload("minilm", 32, 64), id="quick-minilm-32x64"),
    pytest.param(Workload("bert-base", 8, 128), id="bert-base-8x128"),
]
BAR = 1.05


def saved_bytes(step: Step) -> int:
    """Bytes of distinct storages that autograd keeps for the backward, parameters and buffers aside."""
    own = {
        t.untyped_storage().data_ptr() for t in [*step.model.parameters(), *step.model.buffers()]
    }
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = step.loss()
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("load", LOADS)
def test_saved_activations(load, show):
    base = build(load.model)
    frozen = saved_bytes(floor(base, load))
    prepares = {
        "diag k=32": spectral(32),
        "dense k=32": spectral(32, "dense"),
        **{name: p for name, p in PEERS.items() if not name.startswith("torch.compile")},
    }
    ratios = {name: saved_bytes(Step(base, p, load)) / frozen for name, p in prepares.items()}
    lines = [f"\n{load}: saved activations over the frozen model's ({frozen / 2**20:.0f} MiB)"]
    lines += [f"  {n:28} {r:6.3f}" for n, r in sorted(ratios.items(), key=lambda item: item[1])]
    show("\n".join(lines))
    harness.store(f"memory-{load}", ratios)
    assert ratios["diag k=32"] <= BAR
    assert ratios["dense k=32"] <= BAR


def peak_bytes(step: Step) -> int:
    """Most bytes that torch's allocator held at once in a step, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    total = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("core", ["diag", "dense"])
def test_peak_growth_is_one_scratch_weight(load, core, show):
    """Over the frozen model's peak: p of every layer, which F1 counts as saved, and one scratch weight."""
    base = build(load.model)
    frozen = peak_bytes(floor(base, load))
    step = Step(base, spectral(32, core), load)
    growth = peak_bytes(step) - frozen  # of the first step: the scratch is made in it
    layers = [layer for _, layer in spectral_layers(step.model)]
    saved = sum(4 * load.batch * load.length * layer.rank for layer in layers)
    scratch = max(layer.weight.nbytes for layer in layers)
    mib = 2**20
    show(
        f"\n{load}, {core}: peak {growth / mib:+.1f} MiB over the frozen model's {frozen / mib:.0f} MiB: "
        f"p of all layers {saved / mib:.1f} MiB, one scratch weight {scratch / mib:.1f} MiB"
    )
    harness.store(
        f"peak-{core}-{load}",
        {"frozen": frozen, "growth": growth, "saved_p": saved, "scratch": scratch},
    )
    assert growth <= saved + scratch
