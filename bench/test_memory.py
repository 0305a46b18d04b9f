"""Saved activations of a training step against the frozen model's (design section 2, F1)."""

import harness
import pytest
import torch
from models import PEERS, Step, Workload, build, floor, spectral

LOADS = [Workload("minilm", 32, 64), Workload("bert-base", 8, 128)]
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


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_quick_saved_activations(load, show):
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
