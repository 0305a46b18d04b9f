"""Many tasks on one model by their names: one of them active in the layers, or one in every row of a batch.

The values of all tasks are in `Tables`. So a mixed batch is one gather a layer, and tasks come and go
below the capacity without a new allocation.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastspec.model.adapter import adaptation_of
from fastspec.model.targets import spectral_layers
from fastspec.multitask.heads import resize, through_own_task
from fastspec.multitask.tables import CAPACITY, MAX_BYTES, Slot, Tables, head_weight
from fastspec.nn.batch_tasks import BatchTasks, after_call, before_call
from fastspec.nn.layer import SpectralLayer


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
        self.trained = False
        self._places: dict[str, int] = {}
        self._unmixable = _unmixable(self.slots)
        for slot in self.slots:
            if head_weight(slot):
                slot.owner.register_forward_hook(through_own_task)
            slot.owner.task_bank = self  # type: ignore[assignment]
        model.task_bank = self  # type: ignore[assignment]
        model.register_forward_pre_hook(before_call, with_kwargs=True)
        model.register_forward_hook(after_call, always_call=True)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

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

    def nbytes(self) -> int:
        """Bytes of all tables."""
        return self.tables.nbytes()

    def index(self, names: BatchTasks) -> Tensor:
        """Places in the tables, int64 [B], for a batch; -1 is the pretrained model.

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
            [-1 if name is None else self._place(name) for name in names],
            dtype=torch.int64,
            device=device,
        )

    def reserve(self, count: int, head_size: int = 0) -> None:
        """Make room for `count` tasks in all, by doubling the tables, and for heads of `head_size` labels."""
        self.tables.grow(count, (), head_size, fixed=self.trained)

    @torch.no_grad()
    def add(self, tasks: Mapping[str, Mapping[str, Tensor]]) -> None:
        """New tasks, all or none; tensors that a task lacks start as the pretrained model's.

        Raises:
            ValueError: a name is taken or no name, or a tensor does not fit.
        """
        for name in tasks:
            check_name(name, self)
        checked = [self.tables.checked(name, values) for name, values in tasks.items()]
        self.tables.grow(len(self) + len(tasks), checked, fixed=self.trained)
        taken = set(self._places.values())
        free = [place for place in range(self.capacity) if place not in taken][: len(tasks)]
        self.tables.write(free, checked)
        self._places.update(zip(tasks, free, strict=True))

    @torch.no_grad()
    def replace(self, name: str, values: Mapping[str, Tensor]) -> None:
        """New values for a task, in place; see `fastspec.replace_task`."""
        place = self._place(name)
        if name == self.active:
            self._check_unmerged()
        checked = [self.tables.checked(name, values)]
        self.tables.grow(len(self), checked, fixed=self.trained)
        self.tables.write([place], checked)
        if name == self.active:
            self._load(name)

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Forget a task; see `fastspec.remove_task`."""
        place = self._place(name)
        if name == self.active:
            self._check_unmerged()
            self._load(None)
            self.active = None
        self.tables.clear(place)
        del self._places[name]

    @torch.no_grad()
    def activate(self, name: str | None) -> None:
        """Let the model's own parameters hold a task; see `fastspec.set_task`."""
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

        Tasks that a batch does not name get a zero gradient, not none: an optimiser with momentum or
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

    def _place(self, name: str) -> int:
        try:
            return self._places[name]
        except KeyError:
            known = ", ".join(map(repr, list(self._places)[:8])) + (
                ", ..." if len(self) > 8 else ""
            )
            raise ValueError(f"no task {name!r}; the model has: {known or 'none'}") from None

    def _store_active(self) -> None:
        """Write the model's own values into the active task's place in the tables."""
        assert self.active is not None
        values = self.tables.values(self._place(self.active))
        with torch.no_grad():
            torch._foreach_copy_(values, [slot.live for slot in self.slots])

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


def _unmixable(slots: Sequence[Slot]) -> str | None:
    """The tensor, if any, that can't have one value a row of a batch."""
    found = None
    for slot in slots:
        if isinstance(slot.owner, SpectralLayer):
            if slot.leaf != "delta":
                found = f"{slot.name} (train_bias)"
        elif not isinstance(slot.owner, nn.Linear):
            found = f"{slot.name} ({type(slot.owner).__name__})"
    return found
