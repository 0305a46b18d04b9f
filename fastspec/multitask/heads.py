"""Heads of a mixed batch: every row through the head of its own task, heads of different sizes in one batch.

The tables of an `nn.Linear` in a head are buffers beside its parameters: `weight_table` [tasks, size, in]
and `bias_table` [tasks, size], and the pretrained values. Of the layer that gives a head its size, `size` is
the widest task's and `task_sizes` [tasks] says each one's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastspec.nn.batch_tasks import tasks_of_batch


def through_own_task(head: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Forward hook of an `nn.Linear` in a head: its output [B, ..., size] where the batch names tasks.

    What lies beyond a task's own size is -inf: softmax gives it no weight, argmax does not choose it.

    Raises:
        ValueError: the input's dimension 0 is not the batch.
    """
    task = tasks_of_batch(head.task_bank)
    if task is None:
        return None
    x = args[0]
    if x.dim() < 2 or x.shape[0] != task.shape[0]:
        raise ValueError(
            f"a head got {list(x.shape)} in a batch of {task.shape[0]} rows: its input was flattened, "
            "expanded or reordered, and which row is whose can't be known here"
        )
    place = task.clamp_min(0)
    weight = head.weight_table.index_select(0, place)  # [B, size, in]
    blocks = x.flatten(1, -2) if x.dim() > 2 else x[:, None]  # [B, T, in]
    if head.bias is None:
        y = torch.bmm(blocks, weight.mT)
    else:
        y = torch.baddbmm(head.bias_table.index_select(0, place)[:, None], blocks, weight.mT)
    y = y.view(*x.shape[:-1], -1)
    base = F.linear(
        x, head.weight_pretrained, head.bias_pretrained if head.bias is not None else None
    )
    per_row = (task.shape[0], *(1,) * (x.dim() - 1))
    if head.task_sizes is not None:
        base = F.pad(base, (0, y.shape[-1] - base.shape[-1]), value=float("-inf"))
        own = head.task_sizes.index_select(0, place).view(per_row)
        y = y.masked_fill(torch.arange(y.shape[-1], device=y.device) >= own, float("-inf"))
    return torch.where((task < 0).view(per_row), base, y)


def output_layer(head: nn.Module) -> nn.Linear | None:
    """The layer of a head whose size is the task's: its last `nn.Linear`."""
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    return linear[-1] if linear else None


def resize(model: Any, layer: nn.Linear, size: int) -> None:
    """Give a head's output layer another size: new parameters, their values still to be set."""
    former = layer.out_features
    for name, p in list(layer.named_parameters(recurse=False)):
        new = nn.Parameter(p.new_empty(size, *p.shape[1:]), requires_grad=p.requires_grad)
        layer.register_parameter(name, new)
    layer.out_features = size
    # transformers computes its loss by these
    if getattr(model, "num_labels", None) == former:
        model.num_labels = size
        model.config.num_labels = size
