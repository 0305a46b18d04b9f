"""Tables that are trained: parameters of the model as long as they are, and the optimisers that hold them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastspec.multitask.tables import Slot
from fastspec.nn.parts import kept_in_float32


class TaskTables(nn.Module):
    """The tables as parameters, `model.task_tables`: so `zero_grad`, clipping and DDP see them.

    They are outside the state dict: checkpoints are those of a model without tasks.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__()
        self._deltas = []
        for slot in slots:
            table = slot.table
            if not isinstance(table, nn.Parameter):
                table = nn.Parameter(table.detach(), requires_grad=False)
            name = slot.name.replace(".", "-")
            table.requires_grad_()
            self.register_parameter(name, table)
            if slot.leaf == "delta":
                self._deltas.append(name)
            # the layers read the parameter itself, and no module has it as a buffer too
            leaf = f"{slot.leaf}_table"
            slot.owner._buffers.pop(leaf, None)
            slot.owner.__dict__[leaf] = table

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with kept_in_float32(self, self._deltas):
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class Training:
    """The tables of a model while they are trained, and its own parameters, which then are not."""

    def __init__(self, model: nn.Module, slots: Sequence[Slot]) -> None:
        self.model, self.slots = model, slots
        self._frozen = [slot.live for slot in slots if slot.live.requires_grad]
        for p in self._frozen:
            p.requires_grad_(False)
        model.task_tables = TaskTables(slots)

    def end(self) -> None:
        del self.model.task_tables
        as_buffers(self.slots)
        for p in self._frozen:
            p.requires_grad_()


def as_buffers(slots: Iterable[Slot]) -> None:
    """The tables back to where they are while nobody trains them; the same tensors, without gradients."""
    for slot in slots:
        leaf = f"{slot.leaf}_table"
        table = slot.owner.__dict__.pop(leaf)
        table.requires_grad_(False)
        table.grad = None
        slot.owner._buffers[leaf] = table


class Optimizers:
    """The optimisers that have made steps with a bank's tables, and what they remember of its tasks."""

    def __init__(self) -> None:
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._tables: list[weakref.ref[Tensor]] = []
        self._handle: Any = None

    def __deepcopy__(self, memo: dict) -> Optimizers:
        new = Optimizers()
        if self._handle is not None:
            new.watch([copy.deepcopy(table, memo) for table in self._alive()])
        return new

    def __reduce__(self) -> tuple:
        return Optimizers, ()

    def watch(self, tables: Sequence[Tensor]) -> None:
        """From now on see who makes steps with these tables, and refuse who does with former ones."""
        now = {id(table) for table in tables}
        for table in self._alive():
            if id(table) not in now:
                table.replaced_task_table = True  # type: ignore[attr-defined]
        self._tables = [weakref.ref(table) for table in tables]
        ours = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            own = ours()
            if own is not None:
                own._before_step(optimizer, now)

        self.unwatch()
        self._handle = register_optimizer_step_pre_hook(before_step)

    def unwatch(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before_step(self, optimizer: Optimizer, now: set[int]) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in now:
                    self._seen.add(optimizer)
                elif getattr(p, "replaced_task_table", False):
                    raise ValueError(
                        "this optimiser holds tables of tasks that were replaced since, when they grew or "
                        "moved: make a new one of bank.parameters()"
                    )

    def _alive(self) -> list[Tensor]:
        return [table for ref in self._tables if (table := ref()) is not None]

    def check_forgettable(self) -> None:
        """Before a task comes, goes or changes: what an optimiser remembers must be told apart by task.

        Raises:
            ValueError: it has a state of another shape than the tables.
        """
        for table, value in self._states():
            if value.dim() > 0 and value.numel() > 1 and value.shape != table.shape:
                raise ValueError(
                    "an optimiser remembers something of the trained tables that can't be told apart by "
                    f"task (a state {list(value.shape)} of a table {list(table.shape)}): delete it before "
                    "tasks come, go or change, and make a new one afterwards"
                )

    @torch.no_grad()
    def forget(self, places: Sequence[int]) -> None:
        """Momentum and second moments of these places are nobody's any more."""
        for table, value in self._states():
            if value.shape == table.shape:
                value[list(places)] = 0

    def _states(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (table, value)
            for optimizer in self._seen
            for table in self._alive()
            if table in optimizer.state
            for value in optimizer.state[table].values()
            if isinstance(value, Tensor)
        ]
