"""The tables of the tasks: one beside every tensor of the adapter, allocated, checked, read and written.

A table [capacity, *the tensor's shape] is a buffer outside the state dict, on the tensor's own module.
Output layers of heads may differ between tasks in their first dimension, a head's size (its number of
labels): their tables have room for the widest, and `task_sizes` [capacity] beside them says each one's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastspec.model.adapter import adapter_tensors
from fastspec.multitask.heads import output_layer
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
        name = f"{self.leaf}_table"
        held = self.owner._buffers
        return held[name] if name in held else self.owner.__dict__[name]  # type: ignore[return-value]

    @property
    def pretrained(self) -> Tensor:
        return self.owner._buffers[f"{self.leaf}_pretrained"]  # type: ignore[return-value]

    def table_shape(self, capacity: int, size: int) -> torch.Size:
        """Of a table for `capacity` tasks; `size` is the widest output layer's."""
        shape = self.shape
        if self.is_output:
            shape = torch.Size((max(size, shape[0]), *shape[1:]))
        return torch.Size((capacity, *shape))

    def new_table(self, shape: torch.Size) -> Tensor:
        """A table of this shape with the values of the present one, if any; not registered."""
        former = getattr(self.owner, f"{self.leaf}_table", None)
        with torch.no_grad():
            table = torch.zeros(shape, dtype=self.live.dtype, device=self.live.device)
            if former is not None:
                table[tuple(slice(n) for n in former.shape)] = former
        return table


class Tables:
    """All tables of one model, in the order of `slots`. A task has one place in all of them.

    Args:
        model: an adapted one; what its tensors hold now become the pretrained values (coefficients: zero).
        heads: the modules of the model that are trained whole, by name.
        capacity: places at first.
        head_size: the size that output layers have room for at first, if it is above the model's own.
        max_bytes: the most that the tables may take together.

    Raises:
        ValueError: they would take more; the model is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Sequence[str],
        capacity: int,
        head_size: int,
        max_bytes: int,
    ) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        outputs = output_tensors(model, heads)
        self.slots = []
        for name, tensor in adapter_tensors(model).items():
            module, _, leaf = name.rpartition(".")
            owner = model.get_submodule(module)
            self.slots.append(Slot(name, owner, leaf, tensor.shape, name in outputs))
        made = self._allocate(capacity, {slot.owner: head_size for slot in self.slots})
        for slot, table in made:
            value = (
                torch.zeros_like(slot.live) if slot.leaf == "delta" else slot.live.detach().clone()
            )
            slot.owner.register_buffer(f"{slot.leaf}_pretrained", value, persistent=False)
            slot.owner.register_buffer(f"{slot.leaf}_table", table, persistent=False)
            if head_weight(slot):
                sizes = None
                if slot.is_output:
                    sizes = torch.zeros(capacity, dtype=torch.int64, device=slot.live.device)
                slot.owner.register_buffer("task_sizes", sizes, persistent=False)

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(slot.table.nbytes for slot in self.slots)

    def checked(self, name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
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

    def has_room(self, count: int, tasks: Sequence[Mapping[str, Tensor]]) -> bool:
        """Whether `count` tasks in all fit as the tables are, and the heads of these."""
        return count <= self.capacity and all(
            len(values[slot.name]) <= slot.table.shape[1]
            for slot in self.slots
            if slot.is_output
            for values in tasks
        )

    @torch.inference_mode(False)
    def grow(
        self,
        count: int,
        tasks: Sequence[Mapping[str, Tensor]] = (),
        head_size: int = 0,
        *,
        fixed: bool,
    ) -> None:
        """Room for `count` tasks in all, for the sizes of new ones as `checked`, and for `head_size`.

        Raises:
            ValueError: the room is lacking and the tables are `fixed`, or would take too much.
        """
        capacity = capacity_for(count, self.capacity)
        sizes = {
            slot.owner: max(
                [head_size, slot.table.shape[1], *(len(values[slot.name]) for values in tasks)]
            )
            for slot in self.slots
            if slot.is_output
        }
        made = self._allocate(capacity, sizes)
        if made and fixed:
            raise ValueError(
                f"the tables are being trained and have no room for {count} tasks of these sizes: "
                "make the bank with a larger capacity, or bank.requires_grad_(False) first"
            )
        for slot, table in made:
            slot.owner.register_buffer(f"{slot.leaf}_table", table, persistent=False)
        if capacity > self.capacity:
            for owner in sizes:
                own: Tensor = owner.task_sizes  # type: ignore[assignment]
                owner.task_sizes = torch.cat([own, own.new_zeros(capacity - self.capacity)])
        self.capacity = capacity

    def _allocate(self, capacity: int, sizes: Mapping[nn.Module, int]) -> list[tuple[Slot, Tensor]]:
        """Tables in place of those that are too small: all allocated, none registered yet."""
        shapes = {slot: slot.table_shape(capacity, sizes.get(slot.owner, 0)) for slot in self.slots}
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

    def values(self, place: int | None) -> list[Tensor]:
        """Views of a task's values, slot by slot, cut to the task's own sizes; None: the pretrained ones."""
        if place is None:
            return [slot.pretrained for slot in self.slots]
        sizes: dict[nn.Module, int] = {}
        values = []
        for slot in self.slots:
            value = slot.table.select(0, place)  # indexing costs more, layer by layer
            if slot.is_output:
                if slot.owner not in sizes:
                    sizes[slot.owner] = int(slot.owner.task_sizes[place])  # type: ignore[index]
                value = value[: sizes[slot.owner]]
            values.append(value)
        return values

    def write(self, places: list[int], tasks: Sequence[Mapping[str, Tensor]]) -> None:
        """Put tasks, as `checked`, into these places, for which there is room."""
        if not places:
            return
        for slot in self.slots:
            table = slot.table.detach()
            values = [task[slot.name].detach().to(table) for task in tasks]
            index = torch.tensor(places, device=table.device)
            if slot.is_output:
                lengths = torch.tensor([len(v) for v in values], device=table.device)
                slot.owner.task_sizes[index] = lengths  # type: ignore[index, operator]
                for place, value in zip(places, values, strict=True):
                    table[place, : len(value)] = value
                    table[place, len(value) :] = 0
            else:
                table[index] = torch.stack(values)


def head_weight(slot: Slot) -> bool:
    """Whether the slot is the weight of an `nn.Linear` in a head, which mixed batches multiply by."""
    plain = isinstance(slot.owner, nn.Linear) and not isinstance(slot.owner, SpectralLayer)
    return plain and slot.leaf == "weight"


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
