"""Many tasks on one model: their values in tables, one of them active in the layers, or one in every row.

Every tensor of an adapter (coefficients, heads, and biases or norms if trained) has a table
[capacity, *its shape] beside it: a buffer outside the state dict, on the module that owns the tensor. So a
mixed batch is one gather a layer, and tasks come and go below the capacity without a new allocation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastspec.adapter import adaptation_of, adapter_tensors
from fastspec.multitask.heads import by_rows, output_layer, resize
from fastspec.multitask.rows import TaskNames, after_call, before_call
from fastspec.nn import SpectralLayer
from fastspec.targets import spectral_layers

CAPACITY = 8  # of a new bank; it doubles when it is full


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of the adapter: where it lives, and its table beside it."""

    name: str
    owner: nn.Module
    leaf: str
    is_output: bool  # of a head's output layer: tasks may differ in its first dimension

    @property
    def live(self) -> Tensor:
        return getattr(self.owner, self.leaf)

    @property
    def table(self) -> Tensor:
        """[capacity, *shape]; of an output layer the shape is the widest task's."""
        return getattr(self.owner, f"{self.leaf}_table")

    @property
    def pretrained(self) -> Tensor:
        return getattr(self.owner, f"{self.leaf}_pretrained")

    def lay_out(self, capacity: int, size: int) -> None:
        """Make the table, or a larger one with the same values; `size` is the widest output layer's."""
        shape = self.pretrained.shape
        shape = torch.Size((max(size, shape[0]), *shape[1:])) if self.is_output else shape
        former = getattr(self.owner, f"{self.leaf}_table", None)
        if former is not None and former.shape == (capacity, *shape):
            return
        with torch.no_grad():
            table = torch.zeros(capacity, *shape, dtype=self.live.dtype, device=self.live.device)
            if former is not None:
                table[tuple(slice(n) for n in former.shape)] = former
        self.owner.register_buffer(f"{self.leaf}_table", table, persistent=False)


class TaskBank:
    """The tasks of one model; `model.task_bank`. Made by the first `add_task` or `load_tasks`.

    The model's own parameters hold the active task (`set_task`), which is trained as any model. A mixed
    batch (`model(**batch, tasks=[...])`) reads the tables instead.

    Args:
        model: a spectralized model. Its heads as they are now become those of the pretrained model
            (`None`), which new tasks start from.
        capacity: tasks to have room for at first.

    Attributes:
        capacity: rows of the tables; reaching it doubles them, which allocates and recompiles.
        active: the task whose values the model's own parameters hold; None: the pretrained ones.
        trained: whether the tables require gradients (`requires_grad_`).

    Raises:
        ValueError: the model is no spectralized one, or holds biases or norms that were trained already.
    """

    @torch.inference_mode(False)  # what is made here is written to later, anywhere
    def __init__(self, model: nn.Module, capacity: int = CAPACITY) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        adapted = adaptation_of(model)
        shifted = any(bool(layer.delta.any()) for _, layer in spectral_layers(model))
        if shifted and (adapted.config.train_bias or adapted.config.train_layernorm):
            raise ValueError(
                "the model was trained before it had tasks, so its pretrained biases and norms are not "
                "known any more: add tasks to a fresh model"
            )
        self.model = model
        self.capacity = capacity
        self.active: str | None = None
        self.trained = False
        self._rows: dict[str, int] = {}
        outputs = output_tensors(model, adapted.modules_to_save)
        self.slots = []
        for name, tensor in adapter_tensors(model).items():
            module, _, leaf = name.rpartition(".")
            slot = Slot(name, model.get_submodule(module), leaf, name in outputs)
            value = torch.zeros_like(tensor) if leaf == "delta" else tensor.detach().clone()
            slot.owner.register_buffer(f"{leaf}_pretrained", value, persistent=False)
            slot.lay_out(capacity, 0)
            self.slots.append(slot)
        self._unmixable: str | None = None
        for slot in self.slots:
            if isinstance(slot.owner, SpectralLayer):
                if slot.leaf != "delta":
                    self._unmixable = f"{slot.name} (train_bias)"
            elif not isinstance(slot.owner, nn.Linear):
                self._unmixable = f"{slot.name} ({type(slot.owner).__name__})"
            elif slot.leaf == "weight":
                sizes = None
                if slot.is_output:
                    sizes = torch.zeros(capacity, dtype=torch.int64, device=slot.live.device)
                slot.owner.register_buffer("task_sizes", sizes, persistent=False)
                slot.owner.register_forward_hook(by_rows)
            slot.owner.task_bank = self  # type: ignore[assignment]
        model.task_bank = self  # type: ignore[assignment]
        model.register_forward_pre_hook(before_call, with_kwargs=True)
        model.register_forward_hook(after_call, always_call=True)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __repr__(self) -> str:
        mib = self.nbytes() / 2**20
        return (
            f"TaskBank({len(self)} tasks, capacity={self.capacity}, active={self.active!r}, "
            f"{mib:.1f} MiB)"
        )

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(slot.table.nbytes for slot in self.slots)

    def index(self, names: TaskNames) -> Tensor:
        """Rows of the tables, int64 [B], for a batch; -1 is the pretrained model.

        Args:
            names: task names or None, one a row of the batch. A tensor is taken as made by this method.

        Raises:
            ValueError: a name is unknown, or this adapter can't be mixed in one batch.
        """
        self._check_mixable()
        if self.active is not None and (isinstance(names, Tensor) or self.active in names):
            self._store_active()
        if isinstance(names, Tensor):
            return names
        device = self.slots[0].live.device
        return torch.tensor(
            [-1 if name is None else self._row(name) for name in names],
            dtype=torch.int64,
            device=device,
        )

    def reserve(self, count: int) -> None:
        """Make room for `count` tasks in all, by doubling the tables."""
        self._grow(count, ())

    @torch.no_grad()
    def add(self, tasks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """New tasks, all or none; tensors that a task lacks start as the pretrained model's.

        Raises:
            ValueError: a name is taken or no name, or a tensor does not fit.
        """
        for name in tasks:
            if not isinstance(name, str) or not name:
                raise ValueError(f"a task's name must be a string that is not empty, got {name!r}")
            if name in self._rows:
                raise ValueError(
                    f"the task {name!r} is there already: replace_task() or remove_task()"
                )
        checked = [self._checked(name, values) for name, values in tasks.items()]
        self._grow(len(self) + len(tasks), checked)
        taken = set(self._rows.values())
        free = [row for row in range(self.capacity) if row not in taken][: len(tasks)]
        self._write(free, checked)
        self._rows.update(zip(tasks, free, strict=True))

    @torch.no_grad()
    def replace(self, name: str, values: Mapping[str, Tensor]) -> None:
        """New values for a task, in place; see `fastspec.replace_task`."""
        row = self._row(name)
        if name == self.active:
            self._check_unmerged()
        checked = [self._checked(name, values)]
        self._grow(len(self), checked)
        self._write([row], checked)
        if name == self.active:
            self._load(name)

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Forget a task; see `fastspec.remove_task`."""
        row = self._row(name)
        if name == self.active:
            self._check_unmerged()
            self._load(None)
            self.active = None
        for slot in self.slots:
            slot.table[row] = 0
        del self._rows[name]

    @torch.no_grad()
    def activate(self, name: str | None) -> None:
        """Let the model's own parameters hold a task; see `fastspec.set_task`."""
        if name is not None:
            self._row(name)
        if self.trained:
            raise ValueError("the tables are being trained: bank.requires_grad_(False) first")
        self._check_unmerged()
        if self.active is not None:
            self._store_active()
        elif self._holds_unnamed():
            raise ValueError(
                "the model holds values that belong to no task and would be lost: "
                "add_task(model, name, current=True) keeps them"
            )
        self._load(name)
        self.active = name

    def adopt(self, name: str) -> None:
        """Make the values that the model's own parameters hold now a new task, the active one."""
        if self.active is not None:
            self._store_active()
        self.add({name: {slot.name: slot.live.detach() for slot in self.slots}})
        self.active = name

    def requires_grad_(self, trained: bool = True) -> TaskBank:
        """Train the tables themselves: the tasks that a batch names, together. `parameters()` has them.

        The model's own parameters hold the pretrained values meanwhile. Move the model to its device
        before: tables that move afterwards are no leaves any more, which optimisers refuse.
        """
        if trained:
            self._check_mixable()
            self.activate(None)
        for slot in self.slots:
            if slot.table.is_floating_point():
                slot.table.requires_grad_(trained)
        self.trained = trained
        return self

    def parameters(self) -> list[Tensor]:
        """The tables, for an optimiser: each is one tensor of all tasks.

        Rows that a batch does not name get a zero gradient, not none: an optimiser with momentum or
        weight decay moves them all the same.
        """
        return [slot.table for slot in self.slots if slot.table.is_floating_point()]

    def _check_unmerged(self) -> None:
        merged = next((s.name for s in self.slots if getattr(s.owner, "merged", False)), None)
        if merged is not None:
            layer = merged.rpartition(".")[0]
            raise ValueError(f"{layer} is merged: fastspec.unmerge(model) before the task changes")

    def _check_mixable(self) -> None:
        if self._unmixable is not None:
            raise ValueError(
                f"tasks of this adapter can't be mixed in a batch: {self._unmixable} has one value for "
                "all rows, only coefficients and nn.Linear heads have one a row; set_task() serves them"
            )

    def _row(self, name: str) -> int:
        try:
            return self._rows[name]
        except KeyError:
            known = ", ".join(map(repr, list(self._rows)[:8])) + (", ..." if len(self) > 8 else "")
            raise ValueError(f"no task {name!r}; the model has: {known or 'none'}") from None

    def _values(self, name: str | None) -> dict[str, Tensor]:
        """Views of the rows of a task's values in the tables, cut to the task's own sizes."""
        if name is None:
            return {slot.name: slot.pretrained for slot in self.slots}
        row = self._row(name)
        sizes: dict[nn.Module, int] = {}
        values = {}
        for slot in self.slots:
            value = slot.table.detach()[row]
            if slot.is_output:
                if slot.owner not in sizes:
                    sizes[slot.owner] = int(slot.owner.task_sizes[row])  # type: ignore[index]
                value = value[: sizes[slot.owner]]
            values[slot.name] = value
        return values

    def _store_active(self) -> None:
        """Write the model's own values into the active task's row."""
        assert self.active is not None
        with torch.no_grad():
            values = list(self._values(self.active).values())
            torch._foreach_copy_(values, [slot.live for slot in self.slots])

    def _load(self, name: str | None) -> None:
        """Copy a task's values into the model's own parameters."""
        values = list(self._values(name).values())
        for slot, value in zip(self.slots, values, strict=True):
            if slot.is_output and slot.live.shape != value.shape:
                resize(self.model, slot.owner, len(value))  # type: ignore[arg-type]
        torch._foreach_copy_([slot.live for slot in self.slots], values)

    def _holds_unnamed(self) -> bool:
        return any(not torch.equal(slot.live, slot.pretrained) for slot in self.slots)

    def _checked(self, name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A task's values, complete and of the right shapes."""
        unknown = values.keys() - {slot.name for slot in self.slots}
        if unknown:
            raise ValueError(f"task {name!r}: the adapter has no tensor {min(unknown)!r}")
        sizes: dict[nn.Module, int] = {}
        checked = {}
        for slot in self.slots:
            value = values.get(slot.name, slot.pretrained)
            shape = slot.pretrained.shape
            if slot.is_output and value.dim() == len(shape) and len(value) > 0:
                shape = torch.Size((sizes.setdefault(slot.owner, len(value)), *shape[1:]))
            if value.shape != shape:
                raise ValueError(
                    f"task {name!r}: {slot.name} must be {list(shape)}, got {list(value.shape)}"
                )
            checked[slot.name] = value
        return checked

    @torch.inference_mode(False)
    def _grow(self, count: int, checked: Sequence[Mapping[str, Tensor]]) -> None:
        """Room for `count` tasks in all and for the sizes of new ones."""
        capacity = self.capacity
        while capacity < count:
            capacity *= 2
        for slot in self.slots:
            size = 0
            if slot.is_output:
                size = max([slot.table.shape[1], *(len(values[slot.name]) for values in checked)])
            grows = capacity > self.capacity or (slot.is_output and size > slot.table.shape[1])
            if grows and self.trained:
                raise ValueError(
                    f"the tables are being trained and have no room for {count} tasks of these sizes: "
                    "make the bank with a larger capacity, or bank.requires_grad_(False) first"
                )
            if grows:
                slot.lay_out(capacity, size)
        if capacity > self.capacity:
            for owner in {slot.owner for slot in self.slots if slot.is_output}:
                sizes: Tensor = owner.task_sizes  # type: ignore[assignment]
                owner.task_sizes = torch.cat([sizes, sizes.new_zeros(capacity - self.capacity)])
        self.capacity = capacity

    def _write(self, rows: list[int], checked: Sequence[Mapping[str, Tensor]]) -> None:
        if not rows:
            return
        for slot in self.slots:
            table = slot.table.detach()
            values = [task[slot.name].detach().to(table) for task in checked]
            index = torch.tensor(rows, device=table.device)
            if slot.is_output:
                lengths = torch.tensor([len(v) for v in values], device=table.device)
                slot.owner.task_sizes[index] = lengths  # type: ignore[index, operator]
                values = [_padded(v, table.shape[1]) for v in values]
            table[index] = torch.stack(values)


def output_tensors(model: nn.Module, heads: Sequence[str]) -> dict[str, str]:
    """Tensors of the heads' output layers: tensor name to layer name.

    Only modules beside the body are output heads for sure; a module inside it feeds others.
    """
    found: dict[str, str] = {}
    for head in heads:
        module = model.get_submodule(head)
        layer = output_layer(module) if "." not in head else None
        for name, child in module.named_modules(prefix=head):
            if child is layer:
                found |= {f"{name}.{n}": name for n, _ in child.named_parameters(recurse=False)}
    return found


def _padded(value: Tensor, size: int) -> Tensor:
    padding = value.new_zeros(size - len(value), *value.shape[1:])
    return torch.cat([value, padding]) if len(padding) else value
