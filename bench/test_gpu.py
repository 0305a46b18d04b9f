"""The CUDA side, on a real card:  pytest bench/test_gpu.py --device cuda   (docs/gpu.md).

First every kernel against the float64 reference at its default tiles, then the timings: each candidate
of the dispatcher against the frozen layer, for the forward, the backward and both, with the achieved
TFLOP/s and GB/s (counted as in docs/kernels.md) and the peak of memory.
"""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F
from kernel_problems import CORES, exact, problem
from support import assert_close

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (n, in, out, k): default tiles and their edges, few rows, a rank in chunks
SIZES = [
    (1, 64, 64, 16),
    (17, 768, 3072, 32),
    (1000, 384, 384, 64),
    (300, 1000, 72, 40),
    (257, 100, 131, 13),
    (513, 768, 768, 200),
]


@pytest.fixture(scope="module")
def device(request):
    asked = request.config.getoption("--device", "cpu")
    if asked != "cuda":
        pytest.skip("needs a GPU: pytest bench/test_gpu.py --device cuda")
    assert torch.cuda.is_available(), "--device cuda was asked for, and torch sees no usable GPU"
    pytest.importorskip("triton")
    return torch.device("cuda")


def to(t: dict, device: torch.device) -> dict:
    return {key: v if v is None else v.to(device) for key, v in t.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_are_right_on_this_card(size, core, dtype, device):
    """Also the same bits twice, and the TMA variant where this card and these sizes have it."""
    from fastspec.kernels import dispatch, spectral_linear, tma
    from fastspec.kernels.sigma_grad import sigma_grad

    t = problem(*size, core, dtype)
    want = exact(t, core)
    t = to(t, device)
    name = "diag" if core == "task" else core
    factors = (t["u"], t["vh"], t["delta"], name, t["task"])
    implementations = [spectral_linear]
    fits = tma.fits(t["x"], t["g"], t["w"], t["u"], t["vh"])
    if fits and dispatch._tma_serves(size[2], size[3], t["x"], t["w"]):
        implementations.append(tma)
    for module in implementations:

        def run(module=module):
            y, p = module.spectral_linear_fwd(t["x"], t["w"], t["bias"], *factors)
            return y, p, *module.spectral_linear_bwd(t["g"], p, t["w"], *factors)

        first = run()
        for got, exact_result, again in zip(first, want, run(), strict=True):
            assert_close(got.cpu(), exact_result, dtype)
            assert torch.equal(got, again)
    n_tasks = len(t["delta"]) if core == "task" else None
    grad = sigma_grad(t["g"], t["u"], first[1], name, task=t["task"], n_tasks=n_tasks)
    assert_close(grad.cpu(), want[3], dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("core", CORES)
def test_operators_are_right_on_this_card(core, dtype, compiled, device):
    """The public functions, timed choice and all; compiled by Inductor, which sees the kernels."""
    from fastspec.ops.functional import spectral_linear, task_linear

    t = problem(6 * 50, 384, 768, 32, core, dtype)
    batch = torch.tensor([3, -1, 0, 3, -1, 4])
    if core == "task":
        t["task"] = batch.repeat_interleave(50)
    want = exact(t, core)
    t = to(t, device)
    x, delta = t["x"].view(6, 50, 384).requires_grad_(), t["delta"].requires_grad_()
    factors = (t["w"], t["bias"], t["u"], torch.ones(32, device=device), t["vh"], delta)
    if core == "task":
        call, rest, options = task_linear, (batch.to(device),), {}
    else:
        call, rest, options = spectral_linear, (), {"core": core}
    call = torch.compile(call, fullgraph=True) if compiled else call
    y = call(x, *factors, *rest, **options)
    y.backward(t["g"].view_as(y))
    results = (y.flatten(0, 1), x.grad.flatten(0, 1), delta.grad)
    for got, exact_result in zip(results, (want[0], *want[2:]), strict=True):
        assert_close(got.cpu(), exact_result, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_is_right_on_this_card(dtype, device):
    from fastspec.kernels.merge import merge
    from fastspec.ops import reference

    layers = [to(problem(1, 770, 333, 48, "diag", dtype, seed), device) for seed in range(5)]
    names = ("w", "u", "vh", "delta")
    for t, got in zip(layers, merge(*[[t[n] for t in layers] for n in names]), strict=True):
        assert_close(got, reference.effective_weight(*[t[n].double() for n in names]))


def candidates(t: dict, capability: int) -> dict:
    """Name -> (forward, backward from g and p), each of them one pass over the layer."""
    from fastspec.kernels import spectral_linear, tma
    from fastspec.kernels.sigma_grad import sigma_grad
    from fastspec.ops import aten

    x, g, w, b = t["x"], t["g"], t["w"], t["bias"]
    u, vh, delta = t["u"], t["vh"], t["delta"]
    s = torch.ones(len(delta), device=x.device)
    factors = (u, s, vh, delta, "diag")

    def planned(forward):
        return (
            lambda: aten.spectral_linear(x, w, b, *factors, forward, "two_sided"),
            lambda p: aten.spectral_linear_backward(
                g, None, p, w, *factors, forward, "two_sided", True, True
            ),
        )

    def launched(module):
        return (
            lambda: module.spectral_linear_fwd(x, w, b, u, vh, delta),
            lambda p: module.spectral_linear_bwd(g, p, w, u, vh, delta),
        )

    def merged_backward(p):
        dx = aten.spectral_linear_backward(
            g, None, p, w, *factors, "merged", "two_sided", True, False
        )[0]
        return dx, sigma_grad(g, u, p)

    found = {"aten": planned("factored"), "triton": launched(spectral_linear)}
    if x.dtype == torch.float32:
        found["merged"] = (planned("merged")[0], merged_backward)
    elif capability >= 90 and tma.fits(x, g, w, u, vh):
        found["tma"] = launched(tma)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layers_on_this_card(dtype, device, rounds, show):
    import kernel_report as report

    from fastspec.kernels import tiles

    found = {}
    for what, n, d, out, k in report.SHAPES:
        t = to(problem(n, d, out, k, "diag", dtype), device)
        shape = f"{what} k={k} {str(dtype).removeprefix('torch.')}"
        floor = (
            lambda t=t: (F.linear(t["x"], t["w"], t["bias"]), None),
            lambda p, t=t: t["g"] @ t["w"],
        )
        ours = candidates(t, tiles.capability(device))
        expected = exact(t, "diag")
        for forward, backward in ours.values():
            y, p = forward()
            dx, grad = backward(p)
            for got, want in zip((y, p, dx, grad), expected, strict=True):
                assert_close(got, want, dtype)
        flops, moved, _ = report.work(n, d, out, k, dtype.itemsize)
        for phase, share in (("forward", 1), ("backward", 1), ("step", 2)):
            steps = {name: timed(pair, phase) for name, pair in ours.items()}
            timing = harness.pairwise(timed(floor, phase), steps, rounds(15), warmup=3)
            show(harness.table(f"{shape}, {phase}: over the frozen layer", timing))
            for name, ratio in timing.ratios.items():
                ms = ratio.median * timing.floor_ms / REPEATS
                speed = (share * flops / ms / 1e9, share * moved / ms / 1e6)
                row = {"ratio": ratio.median, "ms": ms, "tflops": speed[0], "gb_per_s": speed[1]}
                row |= {"noise": timing.noise}
                if name != harness.FLOOR:
                    row["peak_mb"] = peak_mb(steps[name])
                    show(f"  {name:12} {ms:9.4f} ms {speed[0]:8.1f} TFLOP/s {speed[1]:8.0f} GB/s")
                found[f"{shape} {phase} {name}"] = row
    harness.store(f"gpu-{str(dtype).removeprefix('torch.')}", found)


REPEATS = 20  # calls between two synchronisations: launches overlap as they do in training


def timed(pair, phase: str):
    """A callable that does the phase `REPEATS` times and synchronises."""
    forward, backward = pair
    p = forward()[1]

    def run() -> None:
        for _ in range(REPEATS):
            saved = forward()[1] if phase != "backward" else p
            if phase != "forward":
                backward(saved)
        torch.cuda.synchronize()

    return run


def peak_mb(step) -> float:
    """Peak of allocated memory above what is held already, MB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@pytest.mark.parametrize("layers", [1, 24])
def test_merging_many_layers(layers, device, rounds, show):
    """One launch for a stack of layers against one `addmm` a layer."""
    from fastspec.kernels.merge import merge

    t = [to(problem(1, 768, 768, 32, "diag", torch.bfloat16, i), device) for i in range(layers)]
    operands = [[layer[name] for layer in t] for name in ("w", "u", "vh", "delta")]

    def one_by_one() -> None:
        for w, u, vh, delta in zip(*operands, strict=True):
            torch.addmm(w, (u * delta).to(w.dtype), vh)
        torch.cuda.synchronize()

    def together() -> None:
        merge(*operands)
        torch.cuda.synchronize()

    timing = harness.pairwise(one_by_one, {"merge": together}, rounds(30), warmup=3)
    show(harness.table(f"merging {layers} layers of 768x768: over addmm for each", timing))
    ratios = {name: ratio.median for name, ratio in timing.ratios.items()}
    harness.store(f"gpu-merge-{layers}", {"ratios": ratios, "noise": timing.noise})
