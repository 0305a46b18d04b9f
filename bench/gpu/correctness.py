"""Every kernel, operator and core on the card against float64, in several processes; memory that stays flat.

Kernels run in deterministic mode, where torch fills new tensors with NaN: what a kernel leaves unwritten is
seen. Every kernel runs twice and must give the same bits.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_problems import CORES, exact, problem
from support import relative_error

import fastspec
from fastspec.kernels import dispatch, spectral_linear, tiles, tma
from fastspec.kernels.merge import merge
from fastspec.kernels.sigma_grad import sigma_grad
from fastspec.svd.options import residual_floor
from gpu import calls, device, record, workers
from gpu.device import DEVICE, pick
from gpu.kept import copies
from gpu.record import Record

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PROCESSES = pick(8, 2)
# (n, in, out, k): default tiles and their edges, few rows, ranks in chunks
SIZES = pick(
    [
        (1, 64, 64, 16),
        (17, 768, 3072, 32),
        (1000, 384, 384, 64),
        (300, 1000, 72, 40),
        (257, 100, 131, 13),
        (513, 768, 768, 200),
    ],
    [(5, 24, 16, 8)],
)
KINDS = pick([(BF16, False), (FP16, False), (FP32, False), (FP32, True)], [(FP32, False)])
CALLS = pick(200, 20)  # over which memory must stay flat
FLAT_AFTER = 10
UNTIL_REMEMBERED = 2  # calls after which one repeats what they left (kernels/records.py)
PATIENCE = pick(60, 600)  # seconds for one check


@dataclasses.dataclass(frozen=True)
class Check:
    """A check: its errors by name, and the largest allowed."""

    name: str
    run: Callable[[], tuple[dict[str, float], float]]


def kernels(size: tuple, core: str, dtype: torch.dtype) -> tuple[dict[str, float], float]:
    """The launchers at their default tiles."""
    t = problem(*size, core, dtype, device=DEVICE)
    want = exact(t, core)
    name = "diag" if core == "task" else core
    factors = (t["u"], t["vh"], t["delta"], name, t["task"])
    modules = {"triton": spectral_linear}
    if tma.fits(t["x"], t["g"], t["w"], t["u"], t["vh"]) and dispatch._tma_serves(
        size[2], size[3], t["x"], t["w"]
    ):
        modules["tma"] = tma
    found: dict[str, float] = {}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for label, module in modules.items():

            def run(module: Any = module) -> tuple:
                y, p = module.spectral_linear_fwd(t["x"], t["w"], t["bias"], *factors)
                return y, p, *module.spectral_linear_bwd(t["g"], p, t["w"], *factors)

            first, again = run(), run()
            for what, got, twice, full in zip(
                ("y", "p", "dx", "grad"), first, again, want, strict=True
            ):
                found[f"{label} {what}"] = relative_error(got, full)
                if not torch.equal(got, twice):
                    raise AssertionError(f"{label} {what}: other bits in a second run")
        count = len(t["delta"]) if core == "task" else None
        grad = sigma_grad(t["g"], t["u"], first[1], name, task=t["task"], n_tasks=count)
    finally:
        torch.use_deterministic_algorithms(False)
    found["sigma_grad"] = relative_error(grad, want[3])
    return found, calls.tolerance(dtype)


def lost_descriptors(core: str, dtype: torch.dtype) -> tuple[dict[str, float], float]:
    """What the large tile does to operands that are not aligned: no launcher takes it (`tiles.UNALIGNED`).

    The assembler of Triton 3.6 leaves a uniform register of this kernel unwritten; what ran before decides.
    So the launches alternate with kernels of all sorts, and the row tells how many went wrong. None counts
    as a failure: it is the compiler's.
    """
    t = problem(257, 100, 131, 13, core, dtype, device=DEVICE)
    tile, want = pick(tiles.TABLE["hopper", "16bit", False], None), exact(t, core)
    factors = (t["u"], t["vh"], t["delta"], core)
    wrong = dict.fromkeys(("its forward", "a product", "nothing", "itself"), 0.0)  # what ran before
    p = torch.empty(0)
    results = []  # compared at the end: that runs kernels too
    for name in [name for name in wrong for _ in range(pick(10, 1))]:
        if name == "its forward":
            _, p = spectral_linear.spectral_linear_fwd(t["x"], t["w"], None, *factors, tile=tile)
        elif name == "a product":
            t["x"].mT @ t["x"]
        elif name == "nothing":
            device.synchronise()
            time.sleep(0.05)
        dx, _ = spectral_linear.spectral_linear_bwd(t["g"], p, t["w"], *factors, tile=tile)
        results.append((name, dx))
    for name, dx in results:
        wrong[name] += relative_error(dx, want[2]) > calls.tolerance(dtype)
    return wrong, float("inf")


def operators(core: str, dtype: torch.dtype, how: str) -> tuple[dict[str, float], float]:
    """The public functions: eager, compiled, or in a CUDA graph."""
    rows, d, out, k = pick((6 * 50, 384, 768, 32), (6 * 3, 24, 32, 8))
    t = problem(rows, d, out, k, core, dtype, device=DEVICE)
    batch = torch.tensor([3, -1, 0, 3, -1, 4], device=DEVICE)
    if core == "task":
        t["task"] = batch.repeat_interleave(rows // 6)
    want = exact(t, core)
    x, delta = t["x"].view(6, -1, d).requires_grad_(), t["delta"].requires_grad_()
    factors = (t["w"], t["bias"], t["u"], torch.ones(k, device=DEVICE), t["vh"], delta)

    def call() -> torch.Tensor:
        if core == "task":
            return fastspec.task_linear(x, *factors, batch)
        return fastspec.spectral_linear(x, *factors, core=core)

    if how == "compiled":
        backend = pick("inductor", "eager")
        call = torch.compile(call, fullgraph=True, backend=backend)  # type: ignore[assignment]

    def step() -> tuple:
        y = call()
        return y, *torch.autograd.grad(y, (x, delta), t["g"].view_as(y))

    if how == "eager":
        for _ in range(UNTIL_REMEMBERED):
            step()
    results: Any = device.graphed(step)() if how == "graphed" else step()
    y, dx, grad = results
    pairs = {
        "y": (y.flatten(0, 1), want[0]),
        "dx": (dx.flatten(0, 1), want[2]),
        "grad": (grad, want[3]),
    }
    found = {name: relative_error(got, full) for name, (got, full) in pairs.items()}
    return found, calls.tolerance(dtype)


def merging(dtype: torch.dtype) -> tuple[dict[str, float], float]:
    """Layers merged in one launch, against float64."""
    size = pick((1, 770, 333, 48), (1, 24, 17, 8))
    layers = [problem(*size, "diag", dtype, seed, DEVICE) for seed in range(5)]
    names = ("w", "u", "vh", "delta")
    merged = merge(*[[t[name] for t in layers] for name in names])
    found = {}
    for i, (t, got) in enumerate(zip(layers, merged, strict=True)):
        w, u, vh, delta = (t[name].double() for name in names)
        found[f"layer {i}"] = relative_error(got, w + (u * delta) @ vh)
    return found, calls.tolerance(dtype)


def triplets(m: int, n: int, k: int) -> tuple[dict[str, float], float]:
    """`topk_svd` of a stack with a falling spectrum: values and residuals against float64."""
    g = torch.Generator(DEVICE).manual_seed(0)
    spectrum = (1 + torch.arange(n, device=DEVICE) / 30) ** -0.7
    w = torch.randn(3, m, n, generator=g, device=DEVICE) * spectrum
    found = fastspec.topk_svd(w, k, progress=False)
    s = torch.linalg.svdvals(w.double())[:, :k]
    back = w.double() @ found.vh.double().mT - found.u.double() * found.s.double()[:, None]
    # as `TopkSVD.residual` promises: rounding exact vectors to float32 leaves 3e-8 s_1, which over the last
    # of 768 values, 1e-4 s_1, is 4e-5 whoever computed them
    allowed = s.clamp_min(residual_floor(torch.float32) * s[:, :1])
    residual = (back.norm(dim=1) / allowed).max().item()
    return {"s": relative_error(found.s, s), "residual": residual}, 1e-5


def eigenvalues(order: int, dtype: torch.dtype) -> tuple[dict[str, float], float]:
    """The Jacobi kernel; needs the compiled part."""
    g = torch.Generator(DEVICE).manual_seed(0)
    a = torch.randn(4, order, order, generator=g, device=DEVICE, dtype=torch.float64)
    a = (a + a.mT).to(dtype)
    values, vectors = calls.jacobi_eigh()(a)
    want = torch.linalg.eigvalsh(a.double())
    v = vectors.double()
    one = torch.eye(order, device=DEVICE, dtype=torch.float64).expand(4, -1, -1)
    found = {
        "values": relative_error(values, want),
        "product": relative_error(v @ (values.double()[..., None] * v.mT), a),
        "orthogonal": relative_error(v.mT @ v, one),
    }
    return found, 2e-5 if dtype == FP32 else 1e-12


def flat(what: str) -> tuple[dict[str, float], float]:
    """Bytes by which memory has grown between the tenth and the last of many calls; none is allowed."""
    layer = torch.nn.Linear(*pick((256, 256), (16, 16)), device=DEVICE, dtype=pick(BF16, FP32))
    model = torch.nn.Sequential(layer)
    fastspec.spectralize(
        model, fastspec.SpectralConfig(rank=pick(16, 4), basis="random", modules_to_save=[])
    )
    fastspec.keep_merged(model, what == "training with copies")
    x = torch.randn(
        64, layer.in_features, device=DEVICE, dtype=layer.weight.dtype, requires_grad=True
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def train() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def merge_and_back() -> None:
        fastspec.unmerge(fastspec.merge(model))

    step = merge_and_back if what == "merging" else train
    before = 0
    for i in range(CALLS):
        step()
        if i == FLAT_AFTER:
            before = device.allocated()
    return {"bytes": float(device.allocated() - before)}, 0.0


def in_tf32(allowed: bool, run: Callable[[], tuple]) -> Callable[[], tuple]:
    def inside() -> tuple:
        with calls.tf32(allowed):
            return run()

    return inside


def checks() -> list[Check]:
    return list(_checks())


def _checks() -> Iterator[Check]:
    # what takes longest first: compilations of Inductor
    for core in pick(CORES, CORES[:2]):
        for dtype in pick((BF16, FP32), (FP32,)):
            yield Check(
                f"operator {core} {dtype} compiled",
                lambda c=core, d=dtype: operators(c, d, "compiled"),
            )
    for size in SIZES:
        for core in CORES:
            for dtype, tf32 in KINDS:
                kind = "tf32" if tf32 else str(dtype).removeprefix("torch.")
                run = in_tf32(tf32, lambda s=size, c=core, d=dtype: kernels(s, c, d))
                yield Check(f"kernels {size} {core} {kind}", run)
    for core in ("diag", "dense"):
        for dtype in pick((BF16, FP16), (FP32,)):
            yield Check(
                f"large tile, unaligned, {core} {dtype}: launches of 40 that went wrong",
                lambda c=core, d=dtype: lost_descriptors(c, d),
            )
    for core in CORES:
        for dtype, tf32 in KINDS:
            kind = "tf32" if tf32 else str(dtype).removeprefix("torch.")
            for how in ("eager", "graphed"):
                run = in_tf32(tf32, lambda c=core, d=dtype, h=how: operators(c, d, h))
                yield Check(f"operator {core} {kind} {how}", run)
    for dtype in pick((BF16, FP16, FP32), (FP32,)):
        yield Check(f"merge {dtype}", lambda d=dtype: merging(d))
    for dtype in (BF16, FP16, FP32):
        both = ("eager", "graphed")
        for how in pick(both, both if dtype != FP32 else ("eager",)):  # a CPU looks at the values
            yield Check(f"kept copies {dtype} {how}", lambda d=dtype, h=how: copies(d, h))
    for size in pick(
        [(384, 384, 32), (1536, 384, 32), (768, 768, 768), (50, 40, 3)], [(20, 16, 3)]
    ):
        yield Check(f"topk_svd {size}", lambda s=size: triplets(*s))
    for order in pick((1, 5, 64, 100, 128, 129, 200, 256), (5,)):
        for dtype in (FP32, torch.float64):
            yield Check(f"jacobi_eigh {order} {dtype}", lambda n=order, d=dtype: eigenvalues(n, d))
    for what in ("training", "training with copies", "merging"):
        yield Check(f"memory over {CALLS} calls, {what}", lambda w=what: flat(w))


def check(index: int) -> dict[str, Any]:
    errors, limit = checks()[index].run()
    return {"errors": errors, "limit": limit}


def main() -> int:
    rows = Record("correctness")
    everything = checks()

    def answered(index: int, result: dict[str, Any]) -> None:
        name = everything[index].name
        if "error" in result:
            rows.fail(name, result["error"])
        elif "skipped" in result:
            rows.add(name, **result)
        elif over := {n: e for n, e in result["errors"].items() if not e <= result["limit"]}:
            rows.fail(name, f"over {result['limit']:g}: {over}")
        else:
            worst = max(result["errors"].values())
            found = {"errors": result["errors"]} if result["limit"] == float("inf") else {}
            rows.add(name, worst=worst, limit=result["limit"], seconds=result["seconds"], **found)

    ends = time.time() + record.left()
    workers.run("gpu.correctness", range(len(everything)), PROCESSES, PATIENCE, answered, ends)
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
