"""What tasks attach to a model: hooks of its calls, `generate`, and the forward of DeBERTa's attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.multitask.heads import is_norm, normed_by_own_task, through_own_task
from fastspec.multitask.tables import Slot, head_weight
from fastspec.nn.batch_rows import Rows
from fastspec.nn.batch_tasks import (
    Entry,
    Generation,
    GivenTasks,
    after_call,
    before_call,
    count_rows,
    current,
    opened,
    tasks_of_batch,
)
from fastspec.nn.layer import SpectralLayer


def attach(bank: Any, model: Any, slots: Sequence[Slot]) -> None:
    """Let the model, its parts and its layers know of its bank."""
    for slot in slots:
        owner: Any = slot.owner
        if head_weight(slot):
            owner.register_forward_hook(through_own_task)
        elif is_norm(owner) and slot.leaf == "weight":
            owner.register_forward_hook(normed_by_own_task)
        if not isinstance(owner, SpectralLayer):
            owner.row_layouts = None
        owner.task_bank = bank
    for attention in attentions(model):
        attention.forward = AttentionByTask(attention, bank)  # type: ignore[method-assign]
    # parts that others call by themselves, such as the encoder in `generate`
    for part in [m for m in model.modules() if m is model or hasattr(type(m), "main_input_name")]:
        part.task_bank = bank
        part.register_forward_pre_hook(before_call, with_kwargs=True)
        part.register_forward_hook(after_call, always_call=True)
    if callable(getattr(type(model), "generate", None)):
        model.generate = GenerateWithTasks(model)


def unmixable(slots: Sequence[Slot]) -> str | None:
    """The tensor, if any, that can't have one value a row of a batch."""
    found = None
    for slot in slots:
        if isinstance(slot.owner, SpectralLayer):
            if slot.leaf != "delta":
                found = f"{slot.name} (train_bias)"
        elif not isinstance(slot.owner, nn.Linear) and not is_norm(slot.owner):
            found = f"{slot.name} ({type(slot.owner).__name__})"
    return found


class GenerateWithTasks:
    """A model's `generate`, which names one task a prompt: beams and sequences of a prompt share it.

    A generation is one batch: it keeps the values that its tasks had when it began.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.__doc__ = type(model).generate.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generate = type(self.model).generate
        entry = current()
        given = kwargs.pop("tasks", None)
        names = GivenTasks(given) if given is not None else entry.given if entry else None
        if names is None or (entry is not None and entry.generation is not None):
            return generate(self.model, *args, **kwargs)
        bank = self.model.task_bank
        flight, looked_up = bank.begin(names.given)
        try:
            rows = self._one_a_prompt(looked_up, args, kwargs)
            scope = Entry(names, entry, None, bank, rows, flight, Generation())
            with opened(scope):
                return generate(self.model, *args, **kwargs)
        finally:
            bank.end(flight)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.model).generate)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def _one_a_prompt(self, rows: Rows, args: tuple, kwargs: dict) -> Rows:
        inputs = {"input_ids": kwargs.get("inputs"), **kwargs}
        counted = count_rows(self.model, args[:1], inputs)
        if counted is None or counted[0] == len(rows.task):
            return rows
        prompts = counted[0]
        repeats, rest = divmod(len(rows.task), prompts)
        if rest == 0 and repeats > 0:
            by_prompt = rows.task.view(prompts, repeats)
            if bool((by_prompt == by_prompt[:, :1]).all()):
                return Rows(by_prompt[:, 0], rows.uniform)
        raise ValueError(
            f"tasks must name one task a prompt: got {len(rows.task)} for {prompts} prompts; "
            "beams and sequences of a prompt are all of its task"
        )


class AttentionByTask:
    """The forward of a module whose rows share a product with a task in it: one call for each task.

    DeBERTa's attention projects the relative positions, which all rows have in common, by adapted layers.
    """

    def __init__(self, module: nn.Module, bank: Any) -> None:
        self.module, self.bank = module, bank

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        rows = tasks_of_batch(self.bank)
        if rows is None or rows.uniform:
            return forward(self.module, *args, **kwargs)
        name = type(self.module).__name__
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{name} computes the rows of each task by themselves, which compiled code can't: give a "
                "compiled model of this kind one row at a time, or call it uncompiled"
            )
        bound = inspect.signature(forward).bind(self.module, *args, **kwargs)
        given = dict(bound.arguments)
        count = len(rows.task)
        if given["hidden_states"].shape[0] != count:
            raise ValueError(
                f"{name} got {list(given['hidden_states'].shape)} in a batch of {count} rows: which row is "
                "whose can't be known here"
            )
        outer, parts, order = current(), [], []
        for place, index in _by_task(rows.task):
            scope = Entry(
                outer.given if outer else None, outer, None, self.bank, Rows(place, uniform=True)
            )
            with opened(scope):
                parts.append(forward(**{n: _part(n, v, index, count) for n, v in given.items()}))
            order.append(index)
        back = torch.cat(order).argsort()
        return tuple(
            None if some[0] is None else torch.cat(some).index_select(0, back)
            for some in zip(*parts, strict=True)
        )


def _by_task(task: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each place that is named [1], and its rows."""
    for place in task.unique():
        yield place[None], (task == place).nonzero()[:, 0]


def _part(name: str, value: Any, index: Tensor, count: int) -> Any:
    """An argument's entries for some rows; what has no rows of its own is whole for all."""
    per_row = name in ("hidden_states", "query_states") or (
        name in ("attention_mask", "relative_pos") and isinstance(value, Tensor) and value.dim() > 2
    )
    if isinstance(value, Tensor) and per_row and len(value) == count:
        return value.index_select(0, index)
    return value


def attentions(model: nn.Module) -> list[nn.Module]:
    """DeBERTa's attentions in a model, of all three versions."""
    return [
        module
        for module in model.modules()
        if type(module).__name__ == "DisentangledSelfAttention"
        and type(module).__module__.startswith("transformers.models.deberta")
    ]
