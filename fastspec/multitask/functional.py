"""The public function of one layer with many tasks: validate once, cast, call the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from fastspec import reference
from fastspec.functional import cast, check_sizes, sizes_of
from fastspec.multitask import ops


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
        table: the cores of all tasks, [tasks, k] (core="diag"), [tasks, 2h + 1, k] ("band") or
            [tasks, k, k] ("dense"); float32 as a rule.
        task: int64 [B]: the row of `table` that x[b] takes. A negative one leaves x[b] unadapted: it
            comes out as F.linear(x, weight, bias) has it, bit for bit.

    Returns:
        [B, ..., out], in the dtype of x (of autocast, where that is on).

    Gradients reach x, bias and table; rows of the table that the batch does not name get zero. Where weight
    or a factor requires one too, and inside the transforms of torch.func, the plain formula of
    `fastspec.reference` runs.

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
    # the identity needs y and dx in full precision, and its look at S would make a GPU wait
    full = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    short = singular_basis and x.is_cpu and full
    saves_p = table.requires_grad and torch.is_grad_enabled()
    return ops.task_linear(x, bias, weight, u, s, vh, table, task, core, short, saves_p)
