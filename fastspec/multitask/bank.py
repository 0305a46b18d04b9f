"""Many tasks on one model: their values in tables, one of them active in the layers, or one in every row.

Every tensor of an adapter (coefficients, heads, and biases or norms if trained) has a table
[capacity, *its shape] beside it: a buffer outside the state dict, on the module that owns the tensor. So a
mixed batch is one gather a layer, and tasks come and go below the capacity without a new allocation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastspec.model.adapter import adaptation_of, adapter_tensors
from fastspec.model.targets import spectral_layers
from fastspec.multitask.heads import by_rows, output_layer, resize
from fastspec.nn.batch_tasks import TaskNames, after_call, before_call
from fastspec.nn.layer import SpectralLayer

CAPACITY = 8  # of a new bank; it doubles when it is full
MAX_BYTES = 4 << 30  # 1,024 dense cores of 64 x 64 on BERT-base take 1.2 GB


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of the adapter: where it lives, and its table beside it."""

    name: str
    owner: nn.Module
    leaf: str
    shape: torch.Size  # the pretrained one
    is_output: bool  # of a head's output layer: tasks may differ in its first dimension

    # Switching a task reads these of every layer: through a module's __getattr__ it took half as long again.

    @property
    def live(self) -> Tensor:
        return self.owner._parameters[self.leaf]  # type: ignore[return-value]

    @property
    def table(self) -> Tensor:
        """[capacity, *shape]; of an output layer the shape is the widest task's."""
        return self.owner._buffers[f"{self.leaf}_table"]  # type: ignore[return-value]

    @property
    def pretrained(self) -> Tensor:
        return self.owner._buffers[f"{self.leaf}_pretrained"]  # type: ignore[return-value]

    def table_shape(self, capacity: int, rows: int) -> torch.Size:
        """Of a table for `capacity` tasks; `rows` is the widest output layer's size."""
        shape = self.shape
        if self.is_output:
            shape = torch.Size((max(rows, shape[0]), *shape[1:]))
        return torch.Size((capacity, *shape))

    def new_table(self, shape: torch.Size) -> Tensor:
        """A table of this shape with the values of the present one, if any; not registered."""
        former = getattr(self.owner, f"{self.leaf}_table", None)
        with torch.no_grad():
            table = torch.zeros(shape, dtype=self.live.dtype, device=self.live.device)
            if former is not None:
                table[tuple(slice(n) for n in former.shape)] = former
        return table


class TaskBank:
    """The tasks of one model; `model.task_bank`. Made by the first `add_task` or `load_tasks`.

    The model's own parameters hold the active task (`set_task`), which is trained as any model. A mixed
    batch (`model(**batch, tasks=[...])`) reads the tables instead.

    Args:
        model: a spectralized model. Its heads as they are now become those of the pretrained model
            (`None`), which new tasks start from.
        capacity: tasks to have room for at first.
        head_rows: rows that the tables of output heads have room for at first (a head's size is its
            number of labels); fewer than the model's own count as those.
        max_bytes: the most that the tables may take together. A head's size comes from its adapter
            file and counts once for every task there is room for.

    Attributes:
        capacity: rows of the tables; reaching it doubles them, which allocates and recompiles. So does
            a task whose head is wider than the widest so far and than `head_rows`.
        active: the task whose values the model's own parameters hold; None: the pretrained ones.
        trained: whether the tables require gradients (`requires_grad_`).

    Raises:
        ValueError: the model is no spectralized one, or holds biases or norms that were trained already,
            or the tables would take more than `max_bytes`. The model is unchanged.
    """

    @torch.inference_mode(False)  # what is made here is written to later, anywhere
    def __init__(
        self,
        model: nn.Module,
        capacity: int = CAPACITY,
        head_rows: int = 0,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
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
        self.max_bytes = max_bytes
        self.active: str | None = None
        self.trained = False
        self._rows: dict[str, int] = {}
        outputs = output_tensors(model, adapted.modules_to_save)
        self.slots = []
        for name, tensor in adapter_tensors(model).items():
            module, _, leaf = name.rpartition(".")
            owner = model.get_submodule(module)
            self.slots.append(Slot(name, owner, leaf, tensor.shape, name in outputs))
        tables = self._new_tables(capacity, {slot.owner: head_rows for slot in self.slots})
        for slot, table in tables:
            value = (
                torch.zeros_like(slot.live) if slot.leaf == "delta" else slot.live.detach().clone()
            )
            slot.owner.register_buffer(f"{slot.leaf}_pretrained", value, persistent=False)
            slot.owner.register_buffer(f"{slot.leaf}_table", table, persistent=False)
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

    def reserve(self, count: int, head_rows: int = 0) -> None:
        """Make room for `count` tasks in all, by doubling the tables, and for heads of `head_rows` rows."""
        self._grow(count, (), head_rows)

    @torch.no_grad()
    def add(self, tasks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """New tasks, all or none; tensors that a task lacks start as the pretrained model's.

        Raises:
            ValueError: a name is taken or no name, or a tensor does not fit.
        """
        for name in tasks:
            check_name(name, self)
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

    def _values(self, name: str | None) -> list[Tensor]:
        """Views of a task's values in the tables, slot by slot, cut to the task's own sizes."""
        if name is None:
            return [slot.pretrained for slot in self.slots]
        row = self._row(name)
        sizes: dict[nn.Module, int] = {}
        values = []
        for slot in self.slots:
            value = slot.table.select(0, row)  # indexing costs more, layer by layer
            if slot.is_output:
                if slot.owner not in sizes:
                    sizes[slot.owner] = int(slot.owner.task_sizes[row])  # type: ignore[index]
                value = value[: sizes[slot.owner]]
            values.append(value)
        return values

    def _store_active(self) -> None:
        """Write the model's own values into the active task's row."""
        assert self.active is not None
        with torch.no_grad():
            torch._foreach_copy_(self._values(self.active), [slot.live for slot in self.slots])

    def _load(self, name: str | None) -> None:
        """Copy a task's values into the model's own parameters; without gradients."""
        values = self._values(name)
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
    def _grow(
        self, count: int, checked: Sequence[Mapping[str, Tensor]], head_rows: int = 0
    ) -> None:
        """Room for `count` tasks in all and for the sizes of new ones."""
        capacity = capacity_for(count, self.capacity)
        rows = {
            slot.owner: max(
                [head_rows, slot.table.shape[1], *(len(values[slot.name]) for values in checked)]
            )
            for slot in self.slots
            if slot.is_output
        }
        tables = self._new_tables(capacity, rows)
        if tables and self.trained:
            raise ValueError(
                f"the tables are being trained and have no room for {count} tasks of these sizes: "
                "make the bank with a larger capacity, or bank.requires_grad_(False) first"
            )
        for slot, table in tables:
            slot.owner.register_buffer(f"{slot.leaf}_table", table, persistent=False)
        if capacity > self.capacity:
            for owner in rows:
                sizes: Tensor = owner.task_sizes  # type: ignore[assignment]
                owner.task_sizes = torch.cat([sizes, sizes.new_zeros(capacity - self.capacity)])
        self.capacity = capacity

    def _new_tables(
        self, capacity: int, rows: Mapping[nn.Module, int]
    ) -> list[tuple[Slot, Tensor]]:
        """Tables in place of those that are too small: all allocated, none registered yet."""
        shapes = {slot: slot.table_shape(capacity, rows.get(slot.owner, 0)) for slot in self.slots}
        small = [
            slot
            for slot, shape in shapes.items()
            if getattr(slot.owner, f"{slot.leaf}_table", torch.empty(0)).shape != shape
        ]
        if small:
            check_bytes(
                sum(math.prod(shape) * slot.live.itemsize for slot, shape in shapes.items()),
                capacity,
                self.max_bytes,
            )
        return [(slot, slot.new_table(shapes[slot])) for slot in small]

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
                for row, value in zip(rows, values, strict=True):
                    table[row, : len(value)] = value
                    table[row, len(value) :] = 0
            else:
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


def check_name(name: object, taken: Container[object]) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a task's name must be a string that is not empty, got {name!r}")
    if name in taken:
        raise ValueError(f"the task {name!r} is there already: replace_task() or remove_task()")


def capacity_for(count: int, capacity: int = CAPACITY) -> int:
    """The capacity after making room for `count` tasks by doubling."""
    while capacity < count:
        capacity *= 2
    return capacity


def check_bytes(needed: int, capacity: int, limit: int) -> None:
    """Refuse tables of `needed` bytes before any of them is allocated."""
    if needed > limit:
        raise ValueError(
            f"tables for {capacity:,} tasks would take {needed / 1e6:,.0f} MB, above max_bytes="
            f"{limit:,}: every task has room for the widest head among them; leave that task out, or "
            "raise the limit, as by task_bank(model, max_bytes=...)"
        )
