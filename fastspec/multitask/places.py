"""Where each task stands in the tables: a place, and a number for each use of it.

A row tensor holds `place + (use << 32)`, so a tensor that was made before its task was removed is told
from one of the task that has the place now.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastspec.multitask.flights import Flights

SHIFT = 32
MASK = (1 << SHIFT) - 1
STALE = (
    "tasks names a task that was removed or replaced since the tensor was made, or none of this model: "
    "bank.index(names) again"
)


class Places:
    """Tasks by name, and the use that is made of every place; the latter also where the tables are.

    Callers hold the bank's lock.
    """

    def __init__(self, model: nn.Module, capacity: int, device: torch.device) -> None:
        self.model = model
        self.of: dict[str, int] = {}
        self.uses = [0] * capacity
        self.changes = 0
        self.retired: dict[int, int] = {}  # place: the flight number after which nobody reads it
        self._known = _Known()
        used = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        # [capacity]: the use of each place that a task has, -1 of the others
        model.register_buffer("task_uses", used, persistent=False)

    def grow(self, capacity: int) -> None:
        more = capacity - len(self.uses)
        if more > 0:
            used: Tensor = self.model.task_uses  # type: ignore[assignment]
            self.model.task_uses = torch.cat([used, used.new_full((more,), -1)])
            self.uses += [0] * more

    def free(self, flights: Flights) -> list[int]:
        """Places that no task has and no batch in flight reads."""
        taken = set(self.of.values())
        read = {place for place, moment in self.retired.items() if not flights.over(moment)}
        return [p for p in range(len(self.uses)) if p not in taken and p not in read]

    def put(self, name: str, place: int) -> None:
        """A task gets a place, or another one than it had."""
        self.of[name] = place
        self.retired.pop(place, None)
        self.model.task_uses[place] = self.uses[place]  # type: ignore[operator, index]
        self.changes += 1

    def retire(self, place: int, moment: int) -> None:
        """A place has no task any more; batches that began until `moment` may still read it."""
        self.uses[place] += 1
        self.model.task_uses[place] = -1  # type: ignore[operator, index]
        self.retired[place] = moment
        self.changes += 1

    def drop(self, name: str, moment: int) -> None:
        """Forget a task; `moment` as of `retire`."""
        self.retire(self.of.pop(name), moment)

    def numbered(self, found: list[int], place: Tensor) -> Tensor:
        """The row tensor [B] of these places, which `place` holds too."""
        numbers = [-1 if p < 0 else p | (self.uses[p] << SHIFT) for p in found]
        index = torch.tensor(numbers, dtype=torch.int64, device=place.device)
        self._known.remember(index, place, self.changes)
        return index

    def decoded(self, index: Tensor) -> Tensor:
        """The places [B] that a row tensor, made by `numbered`, names; -1 where it names none.

        Raises:
            TypeError: it is no row tensor.
            ValueError: stale. Compiled code raises RuntimeError, on a GPU a device-side assertion.
        """
        if index.dim() != 1 or index.dtype != torch.int64:
            raise TypeError(
                f"tasks must be names or int64 [B] as TaskBank.index makes it, got {index.dtype} "
                f"{list(index.shape)}"
            )
        used: Tensor = self.model.task_uses  # type: ignore[assignment]
        compiling = torch.compiler.is_compiling()
        if not compiling and (known := self._known.places(index, self.changes)) is not None:
            return known
        place = index & MASK
        inside = place < len(used)
        current = used.index_select(0, torch.where(inside, place, 0).to(used.device))
        unnamed = index < 0
        good = (unnamed | inside & (current.to(index.device) == index >> SHIFT)).all()
        if compiling:
            torch._assert_async(good, STALE)
        elif not good:
            raise ValueError(STALE)
        place = torch.where(unnamed, -1, place).to(used.device)
        if not compiling:
            self._known.remember(index, place, self.changes)
        return place


class _Known:
    """Row tensors that were looked at already: a look costs a wait for a GPU."""

    def __init__(self) -> None:
        self._found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo: object) -> _Known:
        return _Known()

    def __reduce__(self) -> tuple:
        return _Known, ()

    def places(self, index: Tensor, changes: int) -> Tensor | None:
        if index.is_inference():  # counts no versions
            return None
        found = self._found.get(index)
        state = (changes, index._version)
        return found[1] if found is not None and found[0] == state else None

    def remember(self, index: Tensor, place: Tensor, changes: int) -> None:
        if not index.is_inference():
            self._found[index] = ((changes, index._version), place)
