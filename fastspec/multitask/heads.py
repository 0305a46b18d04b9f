"""Heads of a mixed batch: every row through the head of its own task, heads of different sizes in one batch.

The tables of a module in a head lie beside its parameters: of an `nn.Linear`, `weight_table`
[tasks, size, in] and `bias_table` [tasks, size], and the pretrained values; of an `nn.LayerNorm` the same
without `in`. Of the layer that gives a head its size, `size` is the widest task's and `task_sizes` [tasks]
says each one's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastspec.nn.batch_rows import Arranged
from fastspec.nn.batch_tasks import tasks_of_batch


def through_own_task(head: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Forward hook of an `nn.Linear` in a head: its output [B, ..., size] where the batch names tasks.

    What lies beyond a task's own size is -inf: softmax gives it no weight, argmax does not choose it.

    Raises:
        ValueError: which part of the input is whose is not known.
    """
    rows = tasks_of_batch(head.task_bank, head, args[0])
    if rows is None:
        return None
    arranged = rows.arrange(args[0], head)
    x, task = arranged.x, arranged.task
    place = task.clamp_min(0)
    weight = head.weight_table.index_select(0, place)  # [B, size, in]
    blocks = x.flatten(1, -2) if x.dim() > 2 else x[:, None]  # [B, T, in]
    if head.bias is None:
        y = torch.bmm(blocks, weight.mT)
    else:
        y = torch.baddbmm(head.bias_table.index_select(0, place)[:, None], blocks, weight.mT)
    y = y.view(*x.shape[:-1], y.shape[-1])
    base = F.linear(
        x, head.weight_pretrained, head.bias_pretrained if head.bias is not None else None
    )
    if head.task_sizes is not None:
        base = F.pad(base, (0, y.shape[-1] - base.shape[-1]), value=float("-inf"))
        own = _per_row(head.task_sizes.index_select(0, place), x)
        y = y.masked_fill(torch.arange(y.shape[-1], device=y.device) >= own, float("-inf"))
    return _named_or_pretrained(arranged, y, base)


def normed_by_own_task(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """Forward hook of an `nn.LayerNorm` that is trained: every row scaled and shifted by its own task."""
    rows = tasks_of_batch(norm.task_bank, norm, args[0])
    if rows is None:
        return None
    arranged = rows.arrange(args[0], norm)
    x, task = arranged.x, arranged.task
    size, eps = norm.normalized_shape, norm.eps
    shift = norm.bias_pretrained if norm.bias is not None else None
    base = F.layer_norm(x, size, norm.weight_pretrained, shift, eps)
    place = task.clamp_min(0)
    between = (task.shape[0], *(1,) * (x.dim() - 1 - len(size)), *size)
    y = F.layer_norm(x, size, None, None, eps) * norm.weight_table[place].view(between)
    if shift is not None:
        y = y + norm.bias_table[place].view(between)
    return _named_or_pretrained(arranged, y.to(base.dtype), base)


def is_norm(module: nn.Module) -> bool:
    """Whether a mixed batch can give each row a scale and shift of its own in this module."""
    return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward


def _per_row(values: Tensor, x: Tensor) -> Tensor:
    return values.view(values.shape[0], *(1,) * (x.dim() - 1))


def _named_or_pretrained(arranged: Arranged, named: Tensor, base: Tensor) -> Tensor:
    return arranged.back(torch.where(_per_row(arranged.task < 0, base), base, named))


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
