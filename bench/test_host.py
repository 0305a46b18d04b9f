"""Host time of a layer as on a GPU:  pytest -s bench/test_host.py  (no GPU; the machine otherwise idle).

Twelve layers in a row, forward and backward with autograd, on tensors so small that their products take no
time; the CUDA route serves them with launches stubbed (tests/rehearsal.py). What a card's driver takes to
start a kernel is left out for all.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from harness import store
from torch import Tensor, nn

pytest.importorskip("triton")
from kernel_problems import tf32
from rehearsal import rehearsed

from fastspec import SpectralLinear
from fastspec.ops.plan import Plan

LAYERS, ROWS, WIDTH, RANK = 12, 8, 16, 8
MOST, AIM = 60.0, 30.0  # microseconds a layer beyond nn.Linear's
ROUTES = ("aten", "triton", "tma")
CORES = ("diag", "band", "dense")


def frozen() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).requires_grad_(False)


def spectral(core: str) -> nn.Module:
    model = nn.Sequential()
    for plain in frozen():
        layer = SpectralLinear.from_linear(plain, rank=RANK, core=core)
        layer.forced_plan = Plan("factored", "two_sided")  # the one of 16 bits on a GPU
        model.append(layer)
    return model


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=[str(i) for i in range(LAYERS)])
    return peft.get_peft_model(frozen(), config).train()


def step(model: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> tuple[float, float]:
    """Seconds of the forward and of the backward."""
    start = time.perf_counter()
    y = model(x)
    middle = time.perf_counter()
    y.backward(g)
    return middle - start, time.perf_counter() - middle


def per_layer(model: Callable[[Tensor], Tensor], steps: int) -> tuple[float, float]:
    """Microseconds of a layer's forward and backward: medians over so many steps."""
    x, g = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(ROWS, WIDTH)
    gc.collect()
    gc.disable()
    try:
        for _ in range(steps // 10 + 3):
            step(model, x, g)
        times = [step(model, x, g) for _ in range(steps)]
    finally:
        gc.enable()
    forward, backward = (statistics.median(t) for t in zip(*times, strict=True))
    return 1e6 * forward / LAYERS, 1e6 * backward / LAYERS


def one_round(models: dict[str, Callable], steps: int) -> dict[str, tuple[float, float]]:
    """Each model once, the CUDA route's under the rehearsal of its candidate."""
    found = {}
    for name, model in models.items():
        route = name.split()[1] if name.startswith("fastspec") else None
        if route is None:
            found[name] = per_layer(model, steps)
        else:
            with rehearsed(route):
                found[name] = per_layer(model, steps)
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, Callable]:
    torch.manual_seed(0)
    ours = {f"fastspec {route} {core}": spectral(core) for route in ROUTES for core in CORES}
    return {"nn.Linear": frozen(), "PEFT LoRA r8": lora(), **ours}


def test_host_time(models, rounds, show):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tf32(True):
        found = [one_round(models, 40) for _ in range(rounds(5))]
    torch.set_num_threads(threads)
    medians = {
        name: tuple(statistics.median(r[name][i] for r in found) for i in (0, 1)) for name in models
    }
    floor = sum(medians["nn.Linear"])
    show(f"\n  host time of a layer, us{'':15} forward  backward   sum  over nn.Linear")
    for name, (forward, backward) in medians.items():
        total = forward + backward
        show(f"  {name:36} {forward:9.1f} {backward:9.1f} {total:7.1f} {total - floor:9.1f}")
    bars = {"most": MOST, "aim": AIM}
    store("host", {"us": medians, "over nn.Linear": bars})
    ours = [name for name in medians if name.startswith("fastspec")]
    missed = [name for name in ours if sum(medians[name]) - floor > MOST]
    assert not missed, f"over {MOST} us more than nn.Linear: {missed}"
