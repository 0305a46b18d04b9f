"""A program for the sanitizer and the profiler: every kernel of the package, a few launches.

python -m gpu.small kernels  problems that a checker which slows kernels a hundredfold can take
python -m gpu.small jacobi   the same for the eigensolver
python -m gpu.small large    kernels worth a profile, between marks for it
"""

from __future__ import annotations

import sys

import torch
from kernel_problems import problem
from support import relative_error

from fastspec.kernels import dispatch, kept, spectral_linear, tma
from fastspec.kernels.merge import merge
from fastspec.kernels.reduce import reduce_diagonal
from fastspec.kernels.sigma_grad import sigma_grad
from gpu.calls import jacobi_eigh
from gpu.device import DEVICE, REHEARSING, pick, synchronise

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# substrings of the kernels' names
KERNELS = (
    *("spectral_linear", "project_kernel", "sum_by_task", "merge_kernel", "jacobi_eigh"),
    *("reduce_kernel", "keep_kernel", "keep_all", "note_all"),
)


def launch(n: int, d: int, out: int, k: int, core: str, dtype: torch.dtype) -> None:
    t = problem(n, d, out, k, core, dtype, device=DEVICE)
    name = "diag" if core == "task" else core
    factors = (t["u"], t["vh"], t["delta"], name, t["task"])
    modules = [spectral_linear]
    if tma.fits(t["x"], t["g"], t["w"], t["u"], t["vh"]) and dispatch._tma_serves(
        out, k, t["x"], t["w"]
    ):
        modules.append(tma)
    for module in modules:
        _, p = module.spectral_linear_fwd(t["x"], t["w"], t["bias"], *factors)
        module.spectral_linear_bwd(t["g"], p, t["w"], *factors)
    count = len(t["delta"]) if core == "task" else None
    sigma_grad(t["g"], t["u"], p, name, task=t["task"], n_tasks=count)


def merge_some(count: int, d: int, out: int, k: int) -> None:
    layers = [
        problem(1, d, out, k, "diag", pick(BF16, FP32), seed, DEVICE) for seed in range(count)
    ]
    merge(*[[t[name] for t in layers] for name in ("w", "u", "vh", "delta")])


def keep_some(count: int, n: int, d: int, out: int, k: int) -> None:
    """Copies of layers, each alone and all together, and the gradient that belongs to them."""
    dtype = pick(BF16, torch.float16)
    layers = []
    for seed in range(count):
        t = problem(n, d, out, k, "diag", dtype, seed, DEVICE)
        copies = torch.empty_like(t["w"]), torch.full_like(t["delta"], float("nan"))
        factors = t["w"], t["u"], t["vh"], t["delta"], "diag"
        kept.keep(*copies, *factors, False, t["bias"], torch.empty_like(t["bias"]))
        layers.append((*copies, *factors, t["bias"], torch.empty_like(t["bias"])))
        reduce_diagonal(t["g"][:, :k], t["x"][:, :k].contiguous())
    tables = kept.Tables(layers)
    for change in range(2):  # nothing to make, then all
        layers[0][5].add_(change)
        tables.launch()


def jacobi(order: int, dtype: torch.dtype, count: int) -> None:
    """Nearly diagonal matrices, which take few sweeps."""
    g = torch.Generator(DEVICE).manual_seed(0)
    a = torch.randn(count, order, order, generator=g, device=DEVICE, dtype=dtype) / 100
    a = a + a.mT + torch.arange(order, device=DEVICE, dtype=dtype).diag()
    values, _ = jacobi_eigh()(a)
    error = relative_error(values.cpu(), torch.linalg.eigvalsh(a.double().cpu()))
    print(f"jacobi_eigh {order} {dtype}: {error:.1e}")


def tiny_kernels() -> None:
    for dtype in pick((BF16, FP32), (FP32,)):
        for core in ("diag", "dense", "task"):
            launch(*pick((70, 136, 200, 32), (5, 24, 16, 8)), core, dtype)
        launch(*pick((3, 40, 72, 13), (3, 8, 16, 5)), "band", dtype)
    merge_some(2, *pick((136, 72, 32), (16, 8, 4)))
    keep_some(3, *pick((300, 136, 72, 32), (9, 16, 8, 4)))
    synchronise()


def tiny_jacobi() -> None:
    try:
        jacobi_eigh()
    except RuntimeError as error:  # the other kernels are checked all the same
        print(error)
    else:
        # matrix and vectors in shared memory, the vectors in global memory, both in global memory
        for order, dtype, count in pick(
            [(7, FP32, 2), (33, FP32, 2), (7, FP64, 1), (130, FP32, 1), (130, FP64, 1)],
            [(5, FP32, 2), (5, FP64, 1)],
        ):
            jacobi(order, dtype, count)
    synchronise()


def large() -> None:
    """The launches twice, to compile and warm up; only the second time the profiler looks."""
    size = pick((4096, 768, 3072, 32), (5, 24, 16, 8))
    for marked in (False, True):
        synchronise()
        if marked and not REHEARSING:
            torch.cuda.profiler.start()
        launch(*size, "diag", pick(BF16, FP32))
        merge_some(*pick((12, 768, 768, 32), (2, 16, 8, 4)))
        synchronise()
        if marked and not REHEARSING:
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    {"kernels": tiny_kernels, "jacobi": tiny_jacobi, "large": large}[sys.argv[1]]()
