"""The public functions of one layer: validate once, cast, plan, call the operator."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastspec.ops import aten, low_rank, reference
from fastspec.ops import spectral_linear as spectral_operator
from fastspec.ops import task_linear as task_operator
from fastspec.ops.operands import Sizes, cast, check_sizes, sizes_of
from fastspec.ops.plan import WIDE, LayerCall, Plan, make_plan, why_not

DYNAMIC_ROWS = 2048  # rows assumed by a compiled or exported graph that takes any number


def spectral_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    delta: Tensor,
    *,
    core: str = "diag",
    singular_basis: bool = False,
    plan: Plan | None = None,
    effective: Tensor | None = None,
) -> Tensor:
    """y = x (W + U C Vh)^T + b  with the core C stored in `delta` (arXiv 2605.07302).

    Args:
        x: [..., in]; leading dimensions of any number and size.
        weight: [out, in], frozen.
        bias: [out] or None.
        u, s, vh: frozen factors [out, k], [k], [k, in].
        delta: trained: [k] (core="diag"), [2h + 1, k] (core="band": C[i, i + o] = delta[h + o, i]),
            [k, k] (core="dense") or [2r, k] (core="low_rank", see `fastspec.cores`); float32 as a rule,
            also under 16-bit weights.
        core: "diag", "band", "dense" or "low_rank".
        singular_basis: promise that `W V = U S` holds to rounding, as `topk_svd` builds it and as long
            as nothing was cast since. Allows the short-side gradient (design section 2, F3).
        plan: forces a plan; None takes the cost model's. A plan that is not legal here (a short side
            without a singular basis) is refused.
        effective: W + U C Vh for this very `delta`, in the weight's dtype, where the caller keeps it: it
            is then not made again. Excludes `plan`.

    Returns:
        [..., out], in the dtype of x (of autocast, where that is on).

    Gradients reach x, bias and delta. Where weight or a factor requires one too, and inside the transforms
    of torch.func (vmap, grad, jvp), the plain formula of `fastspec.ops.reference` runs.

    Raises:
        ValueError, TypeError: a shape, dtype or choice does not fit; the message names the argument.
    """
    sizes = sizes_of(x, weight, bias, u, s, vh, delta.shape)
    if (
        weight.requires_grad
        or u.requires_grad
        or vh.requires_grad
        or torch._C._are_functorch_transforms_active()
    ):
        check_sizes(sizes, core)
        return reference.spectral_linear(x, weight, bias, u, vh, delta, core)
    x, bias = cast(x, weight, bias)
    if effective is not None:
        if plan is not None:
            raise ValueError("effective and plan exclude each other")
        if effective.shape != weight.shape or effective.dtype != weight.dtype:
            raise ValueError(
                f"effective must be {list(weight.shape)} in {weight.dtype} as the weight, got "
                f"{list(effective.shape)} in {effective.dtype}"
            )
    device = x.device.type
    needs_delta = delta.requires_grad and torch.is_grad_enabled()
    # sizes may be symbolic while torch.compile traces: then they can't be looked up
    choose = _plan_for if torch.compiler.is_compiling() else _known_plan
    plan = choose(
        plan,
        sizes,
        core,
        x.dtype,
        device,
        x.requires_grad,
        needs_delta,
        singular_basis,
        effective is not None,
    )
    gradient = plan.gradient if needs_delta else "none"
    forward = plan.forward
    if core == "low_rank":
        weight = weight if effective is None else effective
        return low_rank.low_rank_linear(x, weight, bias, u, vh, delta, forward, needs_delta)
    if forward == "saved":
        with torch.no_grad():
            effective = aten.merge(weight, u, vh, delta, core, torch.empty_like(weight))
        forward = "resident"
    if effective is not None:
        weight = effective
    return spectral_operator.spectral_linear(
        x, weight, bias, u, s, vh, delta, core, forward, gradient
    )


def task_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    table: Tensor,
    task: Tensor,
    *,
    core: str = "diag",
    singular_basis: bool = False,
) -> Tensor:
    """y = x (W + U C Vh)^T + b, every row of the batch with the core C of its own task.

    Args:
        x: [B, ..., in]; dimension 0 is the batch, all of x[b] is of one task.
        weight, bias, u, s, vh, core, singular_basis: as for `fastspec.spectral_linear`.
        table: the cores of all tasks, [tasks, k] (core="diag"), [tasks, 2h + 1, k] ("band"),
            [tasks, k, k] ("dense") or [tasks, 2r, k] ("low_rank"); float32 as a rule.
        task: int64 [B]: the row of `table` that x[b] takes. A negative one leaves x[b] unadapted: it
            comes out as F.linear(x, weight, bias) has it, bit for bit.

    Returns:
        [B, ..., out], in the dtype of x (of autocast, where that is on).

    Gradients reach x, bias and table; rows of the table that the batch does not name get zero. Where weight
    or a factor requires one too, and inside the transforms of torch.func, the plain formula of
    `fastspec.ops.reference` runs.

    Raises:
        ValueError, TypeError: a shape, dtype or choice does not fit; the message names the argument.
        IndexError: a task beyond the table (on a GPU a device-side assertion).
    """
    if table.dim() < 2 or len(table) == 0:
        raise ValueError(
            f"table must hold the cores of one task or more, got shape {tuple(table.shape)}"
        )
    check_sizes(sizes_of(x, weight, bias, u, s, vh, table.shape[1:]), core)
    if task.dim() != 1 or task.dtype != torch.int64:
        raise TypeError(f"task must be int64 [B], got {task.dtype} {list(task.shape)}")
    if x.dim() < 2 or x.shape[0] != task.shape[0]:
        raise ValueError(
            f"x must have one entry of dimension 0 for each of the {task.shape[0]} rows of the batch, "
            f"got {list(x.shape)}: this layer's input was flattened, expanded or reordered, and which "
            "row is whose can't be known here"
        )
    if (
        weight.requires_grad
        or u.requires_grad
        or vh.requires_grad
        or torch._C._are_functorch_transforms_active()
    ):
        return reference.task_linear(x, weight, bias, u, vh, table, task, core)
    x, bias = cast(x, weight, bias)
    if core == "low_rank":
        return low_rank.low_rank_task_linear(x, weight, bias, u, vh, table, task)
    # the identity needs y and dx in full precision, and its look at S would make a GPU wait
    short = singular_basis and x.is_cpu and x.dtype == weight.dtype and x.dtype in WIDE
    saves_p = table.requires_grad and torch.is_grad_enabled()
    return task_operator.task_linear(x, weight, bias, u, s, vh, table, task, core, short, saves_p)


def _plan_for(
    forced: Plan | None,
    sizes: Sizes,
    core: str,
    dtype: torch.dtype,
    device: str,
    needs_dx: bool,
    needs_delta: bool,
    singular_basis: bool,
    resident: bool,
) -> Plan:
    """The plan of operands of these sizes, which are checked before; a forced one is checked too.

    All in one, looked up by position before there is a `LayerCall` to make and to hash: on a small layer
    (64 rows of 384 x 384) the checks, the plan and its keywords took 7 % of a step; the processor comes to
    them from a product, with cold caches.
    """
    check_sizes(sizes, core)
    x, weight, _, u, *_rest = sizes
    n = math.prod(x[:-1])
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

        if not has_static_value(n):
            n = DYNAMIC_ROWS  # to compare a varying size would compile again on every side of it
    call = LayerCall(
        n,
        weight[1],
        weight[0],
        u[1],
        core,
        dtype,
        device,
        needs_dx,
        needs_delta,
        singular_basis,
        resident,
    )
    if forced is None:
        return make_plan(call)
    reason = why_not(forced, call)
    if reason is not None:
        raise ValueError(f"plan {forced} is refused: {reason}")
    return forced


_known_plan = functools.lru_cache(4096)(_plan_for)
