"""Many tasks on one model by their names: one of them active in the layers, or one in every row of a batch.

The values of all tasks are in `Tables`. So a mixed batch is one gather a layer, and tasks come and go
below the capacity without a new allocation.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.model.adapter import adaptation_of
from fastspec.model.targets import spectral_layers
from fastspec.multitask.flights import Flight, Flights
from fastspec.multitask.heads import resize
from fastspec.multitask.places import Places
from fastspec.multitask.probe import KnownLayouts
from fastspec.multitask.tables import CAPACITY, MAX_BYTES, Slot, Tables
from fastspec.multitask.trained import Optimizers, Training
from fastspec.multitask.wrapped import attach, attentions, unmixable
from fastspec.nn.batch_rows import Rows
from fastspec.nn.batch_tasks import BatchTasks, refuse_inside_call


class TaskBank:
    """The tasks of one model; `model.task_bank`. Made by the first `add_task` or `load_tasks`.

    The model's own parameters hold the active task (`set_task`), which is trained as any model. A mixed
    batch (`model(**batch, tasks=[...])`) reads the tables instead.

    Args:
        model: a spectralized model. Its heads as they are now become those of the pretrained model
            (`None`), which new tasks start from.
        capacity: tasks to have room for at first.
        head_size: the size that the tables of output heads have room for at first (a head's size is its
            number of labels); less than the model's own counts as that.
        max_bytes: the most that the tables may take together. A head's size comes from its adapter
            file and counts once for every task there is room for.

    Attributes:
        tables: the values of all tasks.
        capacity: tasks that the tables have room for; reaching it doubles them, which allocates and
            recompiles. So does a task whose head is wider than the widest so far and than `head_size`.
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
        head_size: int = 0,
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
        heads = adapted.modules_to_save
        self.tables = Tables(model, heads, capacity, head_size, max_bytes)
        self.model = model
        self.active: str | None = None
        self.flights = Flights()
        self._places = Places(model, capacity, self.slots[0].live.device)
        self._optimizers = Optimizers()
        self._training: Training | None = None
        self._layouts = KnownLayouts(self.flights)
        self._unmixable = unmixable(self.slots)
        attach(self, model, self.slots)

    def __len__(self) -> int:
        return len(self._places.of)

    def __contains__(self, name: object) -> bool:
        return name in self._places.of

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._places.of))

    def __repr__(self) -> str:
        mib = self.nbytes() / 2**20
        return (
            f"TaskBank({len(self)} tasks, capacity={self.capacity}, active={self.active!r}, "
            f"{mib:.1f} MiB)"
        )

    @property
    def slots(self) -> list[Slot]:
        return self.tables.slots

    @property
    def capacity(self) -> int:
        return self.tables.capacity

    @property
    def trained(self) -> bool:
        return self._training is not None

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return self.tables.nbytes()

    @torch.inference_mode(False)
    def index(self, names: BatchTasks) -> Tensor:
        """A row tensor, int64 [B], for a batch: what `tasks` takes where names can't be given.

        It is good until one of its tasks is removed, or replaced while batches are in flight; a batch that
        comes with it later is refused. -1 is the pretrained model.

        Args:
            names: task names or None, one a row of the batch. A tensor is checked and comes back.

        Raises:
            ValueError: a name is unknown, a tensor is stale, or this adapter can't be mixed in one batch.
        """
        with self.flights.lock:
            rows = self.look_up(names)
            if isinstance(names, Tensor):
                return names
            return self._places.numbered(self._found(names), rows.task)

    @torch.inference_mode(False)
    def look_up(self, names: BatchTasks) -> Rows:
        """The tasks of a batch by their places, as the tables are now."""
        self._check_mixable()
        with self.flights.lock:
            if self.active is not None and (isinstance(names, Tensor) or self.active in names):
                self._store_active()
            if isinstance(names, Tensor):
                return Rows(self._places.decoded(names), uniform=len(names) == 1)
            found = self._found(names)
            task = torch.tensor(found, dtype=torch.int64, device=self.slots[0].live.device)
            return Rows(task, uniform=len(set(found)) == 1)

    def _found(self, names: BatchTasks) -> list[int]:
        return [-1 if name is None else self._place(name) for name in names]

    def places(self, index: Tensor) -> Tensor:
        """The places [B] in the tables that a row tensor names; -1 for none."""
        return self._places.decoded(index)

    def begin(self, names: BatchTasks | None) -> tuple[Flight, Rows | None]:
        """A batch starts: the values that it reads stay as they are until `end`."""
        with self.flights.lock:
            self.flights.wait()
            rows = None if names is None else self.look_up(names)
            return self.flights.begin(), rows

    def end(self, flight: Flight) -> None:
        self.flights.end(flight)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Around what no hook sees, compiled calls and replays of CUDA graphs: one batch in flight.

        Row tensors made inside and the values they stand for stay as they are until it ends.
        """
        flight, _ = self.begin(None)
        try:
            yield
        finally:
            self.end(flight)

    def learn_layouts(self, model: nn.Module, args: tuple, kwargs: dict, rows: Rows) -> None:
        """Find out where rows lie in every layer's input, for rows of different tasks."""
        if not rows.uniform and len(rows.task) > 0:
            by_task = functools.partial(attentions, self.model)
            self._layouts.learn(model, args, kwargs, len(rows.task), by_task)

    def reserve(self, count: int, head_size: int = 0) -> None:
        """Make room for `count` tasks in all, by doubling the tables, and for heads of `head_size` labels."""
        with self._alone():
            self._grow(count, (), head_size)

    @torch.no_grad()
    def add(self, tasks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """New tasks, all or none; tensors that a task lacks start as the pretrained model's.

        Batches in flight go on meanwhile, unless the tables must grow.

        Raises:
            ValueError: a name is taken or no name, or a tensor does not fit.
        """
        with self.flights.lock:
            checked = self._checked_new(tasks)
            free = self._free()
            if len(free) >= len(tasks) and self.tables.has_room(len(self) + len(tasks), checked):
                self._write_new(tasks, free, checked)
                return
        with self._alone():
            checked = self._checked_new(tasks)
            self._grow(len(self) + len(tasks), checked)
            self._write_new(tasks, self._free(), checked)

    @torch.no_grad()
    def replace(self, name: str, values: Mapping[str, Tensor]) -> None:
        """New values for a task; see `fastspec.replace_task`."""
        with self.flights.lock:
            place = self._place(name)
            checked = [self.tables.checked(name, values)]
            if name != self.active and self.tables.has_room(len(self), checked):
                self._optimizers.check_forgettable()
                free = [place] if self.flights.none() else self._free()
                if free:
                    self._write(free[:1], checked)
                    self._move(name, free[0])
                    return
        with self._alone():
            place = self._place(name)
            if name == self.active:
                self._check_unmerged()
            self._optimizers.check_forgettable()
            self._grow(len(self), checked)
            self._write([place], checked)
            if name == self.active:
                self._load(name)

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Forget a task; see `fastspec.remove_task`."""
        with self.flights.lock:
            self._place(name)
            self._optimizers.check_forgettable()
            if name != self.active:
                self._places.drop(name, self.flights.now())
                return
        with self._alone():
            if name == self.active:
                self._check_unmerged()
                self._load(None)
                self.active = None
        self.remove(name)

    @torch.no_grad()
    def activate(self, name: str | None) -> None:
        """Let the model's own parameters hold a task; see `fastspec.set_task`."""
        with self._alone():
            if name is not None:
                self._place(name)
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
        with self._alone():
            if self.active is not None:
                self._store_active()
            self.add({name: {slot.name: slot.live.detach() for slot in self.slots}})
            self.active = name

    def requires_grad_(self, trained: bool = True) -> TaskBank:
        """Train the tables themselves: the tasks that a batch names, together. `parameters()` has them.

        The model's own parameters hold the pretrained values meanwhile and take no part; the tables are
        parameters of the model (`model.task_tables`), so that `model.zero_grad()`, gradient clipping and
        `DistributedDataParallel` (made afterwards) see them. Move the model to its device before.
        """
        with self._alone():
            if trained == self.trained:
                return self
            if self._training is not None:
                self._optimizers.unwatch()
                self._training.end()
                self._training = None
                return self
            self._check_mixable()
            self.activate(None)
            self._training = Training(self.model, self._floating())
            self._optimizers.watch(self.parameters())
        return self

    def parameters(self) -> list[Tensor]:
        """The tables, for an optimiser: each is one tensor of all tasks.

        Tasks that a batch does not name get a zero gradient, not none: an optimiser with momentum or
        weight decay moves them all the same.
        """
        return [slot.table for slot in self._floating()]

    def _floating(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.table.is_floating_point()]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other batch is in flight, and none starts."""
        refuse_inside_call(self)
        with self.flights.alone():
            yield

    def _check_unmerged(self) -> None:
        merged = next((s.name for s in self.slots if getattr(s.owner, "merged", False)), None)
        if merged is not None:
            layer = merged.rpartition(".")[0]
            raise ValueError(f"{layer} is merged: fastspec.unmerge(model) before the task changes")

    def _check_mixable(self) -> None:
        if self._unmixable is not None:
            raise ValueError(
                f"tasks of this adapter can't be mixed in a batch: {self._unmixable} has one value for "
                "all rows, only coefficients, nn.Linear heads and nn.LayerNorm have one a row; set_task() "
                "serves them"
            )

    def _place(self, name: str) -> int:
        try:
            return self._places.of[name]
        except KeyError:
            known = ", ".join(map(repr, list(self)[:8])) + (", ..." if len(self) > 8 else "")
            raise ValueError(f"no task {name!r}; the model has: {known or 'none'}") from None

    def _checked_new(self, tasks: Mapping[str, Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        for name in tasks:
            check_name(name, self)
        self._optimizers.check_forgettable()
        return [self.tables.checked(name, values) for name, values in tasks.items()]

    def _write_new(self, tasks: Mapping[str, Any], free: list[int], checked: list[dict]) -> None:
        self._write(free[: len(tasks)], checked)
        for name, place in zip(tasks, free, strict=False):
            self._places.put(name, place)

    def _write(self, places: list[int], checked: list[dict[str, Tensor]]) -> None:
        self.tables.write(places, checked)
        self._optimizers.forget(places)

    def _move(self, name: str, place: int) -> None:
        """A task has its values at `place` from now on; batches in flight read the former one."""
        former = self._places.of[name]
        if place != former:
            self._places.put(name, place)
            self._places.retire(former, self.flights.now())

    def _free(self) -> list[int]:
        return self._places.free(self.flights)

    def _grow(self, count: int, tasks: Sequence[Mapping[str, Tensor]], head_size: int = 0) -> None:
        self.tables.grow(count, tasks, head_size, fixed=self.trained)
        self._places.grow(self.capacity)

    @torch.no_grad()
    def _store_active(self) -> None:
        """Write the model's own values into the active task's place in the tables."""
        assert self.active is not None
        own = [slot.live for slot in self.slots]
        values = self.tables.values(self._place(self.active))
        if not self.flights.none():
            if all(map(torch.equal, values, own)):
                return
            if free := self._free():
                self._write(free[:1], [{slot.name: slot.live for slot in self.slots}])
                self._move(self.active, free[0])
                return
            with self._alone():
                torch._foreach_copy_(values, own)
                return
        torch._foreach_copy_(values, own)

    def _load(self, name: str | None) -> None:
        """Copy a task's values into the model's own parameters; without gradients."""
        values = self.tables.values(None if name is None else self._place(name))
        for slot, value in zip(self.slots, values, strict=True):
            if slot.is_output and slot.live.shape != value.shape:
                resize(self.model, slot.owner, len(value))  # type: ignore[arg-type]
        torch._foreach_copy_([slot.live for slot in self.slots], values)

    def _holds_unnamed(self) -> bool:
        return any(not torch.equal(slot.live, slot.pretrained) for slot in self.slots)


def check_name(name: object, taken: Container[object]) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a task's name must be a string that is not empty, got {name!r}")
    if name in taken:
        raise ValueError(f"the task {name!r} is there already: replace_task() or remove_task()")
