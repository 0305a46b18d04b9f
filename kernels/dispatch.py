"""The operators on a GPU: what can serve each call, for `choice` to choose from.

    triton  the fused tile program                          (spectral_linear.py)
    tma     the same with tiles fetched by TMA, sm_90 on    (tma.py)
    merged  W_eff in scratch, cuBLAS, and `sigma_grad`      (float32: 16 bits would round it)
    aten    the plan's own ATen calls                       (always possible)

Every function takes its operator's arguments, and as `aten` that operator on ATen calls. With `trace`
the calls are such as torch.compile sees, and the result is None where there are none (`Call.trace`). With
`keep` the result has a third part, how to serve such a call again (`Call.run_to_keep`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastspec.kernels import MAX_RANK, records, tiles, tma
from fastspec.kernels import spectral_linear as plain
from fastspec.kernels.choice import Call, describe
from fastspec.kernels.launch import tracing
from fastspec.kernels.sigma_grad import sigma_grad

TMA_ROWS = tiles.FEW_ROWS + 1  # from so many rows on
Result = tuple[Tensor, Tensor]
Candidates = dict[str, Callable[[], Result]]


def spectral_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    s: Tensor,  # [k]
    vh: Tensor,  # [k, in]
    delta: Tensor,
    core: str,
    forward: str,
    gradient: str,
    *,
    aten: Callable[..., Result],
    trace: bool = False,
    keep: bool = False,
) -> Any:
    """y [..., out] and p [N, k] (no rows where the plan saves none), as `aten` gives them."""
    operands = (x, weight, bias, u, s, vh, delta, core)
    saves_p = gradient == "two_sided"

    def planned(forward: str) -> Callable[[], Result]:
        return lambda: aten(*operands, forward, gradient)

    candidates = {"aten": planned(forward)}
    if _by_p(forward, gradient):
        fused = _fused_forward(x, weight, bias, u, vh, delta, core, None, saves_p)
        candidates |= fused
        if fused and x.dtype == torch.float32 and forward != "merged":
            candidates["merged"] = planned("merged")
    kind = describe("fwd", core, (_matrix(x), weight, u, vh), saves_p, bias is not None)
    call = Call(kind, candidates, x, *_rank_and_width(weight, u), traceable=gradient != "short")
    if keep:
        return call.run_to_keep(records.FORWARD)
    return call.trace() if trace else call.run()


def spectral_linear_backward(
    g: Tensor,  # [..., out]
    x: Tensor | None,
    p: Tensor | None,  # [N, k]
    weight: Tensor,  # [out, in]
    u: Tensor,  # [out, k]
    s: Tensor,  # [k]
    vh: Tensor,  # [k, in]
    delta: Tensor,
    core: str,
    forward: str,
    gradient: str,
    needs_dx: bool,
    needs_delta: bool,
    *,
    aten: Callable[..., Result],
    trace: bool = False,
    keep: bool = False,
) -> Any:
    """dx [..., in] and d delta; as `aten` gives them: empty where not needed."""
    factors = (weight, u, s, vh, delta, core)

    def planned(forward: str, needs_delta: bool) -> Result:
        return aten(g, x, p, *factors, forward, gradient, needs_dx, needs_delta)

    def merged() -> Result:
        dx = planned("merged", False)[0]
        if not needs_delta:
            return dx, delta.new_empty(0)
        assert p is not None
        half_width = delta.shape[0] // 2
        return dx, sigma_grad(g.reshape(-1, g.shape[-1]), u, p, core, half_width=half_width)

    candidates: Candidates = {"aten": lambda: planned(forward, needs_delta)}
    if _by_p(forward, gradient):
        operands = (g, p, weight, u, vh, delta, core, None)
        fused = _fused_backward(*operands, needs_dx, needs_delta)
        candidates |= fused
        if fused and needs_dx and g.dtype == torch.float32:
            candidates["merged"] = merged
    kind = describe("bwd", core, (_matrix(g), weight, u, vh), needs_dx, needs_delta)
    call = Call(kind, candidates, g, *_rank_and_width(weight, u), traceable=gradient != "short")
    if keep:
        return call.run_to_keep(records.BACKWARD)
    return call.trace() if trace else call.run()


def task_linear(
    x: Tensor,  # [B, ..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, k]
    s: Tensor,  # [k]
    vh: Tensor,  # [k, in]
    table: Tensor,  # [tasks, the core's storage]
    task: Tensor,  # [B]
    core: str,
    short: bool,
    saves_p: bool,
    *,
    aten: Callable[..., Result],
    trace: bool = False,
) -> Result | None:
    """y [B, ..., out] and p [N, k] (no rows where it is not saved); only a diagonal core has kernels."""
    operands = (x, weight, bias, u, s, vh, table, task, core, short, saves_p)
    candidates: Candidates = {"aten": lambda: aten(*operands)}
    if core == "diag":
        rows = _task_of_rows(task, x)
        candidates |= _fused_forward(x, weight, bias, u, vh, table, core, rows, saves_p)
    kind = describe("task fwd", core, (_matrix(x), weight, u, vh), saves_p, bias is not None)
    call = Call(kind, candidates, x, *_rank_and_width(weight, u), traceable=not short)
    return call.trace() if trace else call.run()


def task_linear_backward(
    g: Tensor,  # [B, ..., out]
    p: Tensor | None,  # [N, k]
    weight: Tensor,  # [out, in]
    u: Tensor,  # [out, k]
    s: Tensor,  # [k]
    vh: Tensor,  # [k, in]
    table: Tensor,  # [tasks, the core's storage]
    task: Tensor,  # [B]
    core: str,
    short: bool,
    needs_dx: bool,
    needs_table: bool,
    *,
    aten: Callable[..., Result],
    trace: bool = False,
) -> Result | None:
    """dx [B, ..., in] and d table; what is not needed comes back empty."""
    operands = (g, p, weight, u, s, vh, table, task, core, short, needs_dx, needs_table)
    candidates: Candidates = {"aten": lambda: aten(*operands)}
    if core == "diag":
        rows = _task_of_rows(task, g)
        factors = (weight, u, vh, table, core, rows)
        candidates |= _fused_backward(g, p, *factors, needs_dx, needs_table)
    kind = describe("task bwd", core, (_matrix(g), weight, u, vh), needs_dx, needs_table)
    call = Call(kind, candidates, g, *_rank_and_width(weight, u), traceable=not short)
    return call.trace() if trace else call.run()


# ------------------------------------------------------------------------------------ tile programs


def _fused_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    vh: Tensor,
    delta: Tensor,
    core: str,
    task: Tensor | None,  # [N]
    saves_p: bool,
) -> Candidates:
    """The tile programs that can take this forward."""
    out, k = u.shape
    x2 = _matrix(x)

    def launched(module: ModuleType) -> Callable[[], Result]:
        def call() -> Result:
            y, p = module.spectral_linear_fwd(x2, weight, bias, u, vh, delta, core, task)
            return y.view(*x.shape[:-1], out), p if saves_p else x.new_empty((0, k))

        return call

    if not _kernels_serve(delta, k, x2, weight, u, vh):
        return {}
    found = {"triton": launched(plain)}
    if _tma_serves(out, k, x2, weight, u, vh):
        found["tma"] = launched(tma)
    return found


def _fused_backward(
    g: Tensor,
    p: Tensor | None,
    weight: Tensor,
    u: Tensor,
    vh: Tensor,
    delta: Tensor,
    core: str,
    task: Tensor | None,  # [N]
    needs_dx: bool,
    needs_delta: bool,
) -> Candidates:
    """The tile programs that can take this backward."""
    d, k = weight.shape[1], u.shape[1]
    g2 = _matrix(g)
    saved = g2 if p is None else p  # without a coefficient gradient p is not read
    operands = (g2, saved, weight, u, vh, delta, core, task)

    def returned(dx: Tensor | None, grad: Tensor | None) -> Result:
        shaped = g.new_empty(0) if dx is None else dx.view(*g.shape[:-1], d)
        return shaped, delta.new_empty(0) if grad is None else grad

    def triton() -> Result:
        launch = plain.spectral_linear_bwd
        return returned(*launch(*operands, needs_dx=needs_dx, needs_delta=needs_delta))

    def by_tma() -> Result:
        return returned(*tma.spectral_linear_bwd(*operands, needs_delta=needs_delta))

    has_p = p is not None or not needs_delta
    if not (has_p and _kernels_serve(delta, k, g2, weight, u, vh)):
        return {}
    found: Candidates = {"triton": triton}
    if needs_dx and _tma_serves(d, k, g2, weight, u, vh):
        found["tma"] = by_tma
    return found


def _by_p(forward: str, gradient: str) -> bool:
    """Whether the plan is one of those that the kernels stand for."""
    return forward in ("merged", "factored") and gradient in ("two_sided", "none")


def _kernels_serve(delta: Tensor, k: int, *operands: Tensor) -> bool:
    """Whether Triton can take the operands: one 16- or 32-bit dtype, rank, nothing empty."""
    dtypes = {t.dtype for t in operands}
    return (
        len(dtypes) == 1
        and dtypes <= {torch.float32, torch.bfloat16, torch.float16}
        and delta.dtype == torch.float32
        and k <= MAX_RANK
        and all(t.numel() for t in operands)
    )


def _tma_serves(columns: int, k: int, a: Tensor, *operands: Tensor) -> bool:
    """Whether TMA can fetch the operands and store a result of this many columns.

    With few rows the plain kernel is faster, whose tiles are narrower (docs/gpu.md).
    """
    return (
        tma.AVAILABLE
        and a.shape[0] >= TMA_ROWS
        and tiles.capability(a.device) >= 90
        and not tracing()  # traced tensors have no address to look at
        and plain.fuses(a, k)
        and tma.fits(a, *operands)
        and columns * a.element_size() % 16 == 0
    )


def _matrix(a: Tensor) -> Tensor:
    """The rows [N, columns] of `a` [..., columns]."""
    return a if a.dim() == 2 else a.reshape(-1, a.shape[-1])


def _rank_and_width(weight: Tensor, u: Tensor) -> tuple[int, int]:
    """k, and the short side of the layer."""
    return u.shape[1], min(map(tiles.hint, weight.shape))


def _task_of_rows(task: Tensor, a: Tensor) -> Tensor:
    """The task of each of the N rows that `a` [B, ..., columns] flattens to."""
    return task[:, None].expand(-1, math.prod(a.shape[1:-1])).reshape(-1)
