"""Which task each row of a batch belongs to: from the call of the model down to its layers.

In eager code a context variable carries it, so that threads and coroutines do not meet. `torch.compile`
can't trace context variables: there the tasks arrive as an argument of the model (a tensor), and the way
from the argument to the layers is traced, through `_traced`, and gone when the compiled code runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

BatchTasks = Sequence["str | None"] | Tensor


class Bank(Protocol):
    """What this module needs of a `TaskBank`, which is built on it."""

    trained: bool

    def index(self, names: BatchTasks) -> Tensor: ...


class GivenTasks:
    """The tasks of one batch as given, and their places in a model's tables once looked up."""

    def __init__(self, given: BatchTasks) -> None:
        if isinstance(given, str):
            raise TypeError(f"tasks must be a list of names, one a row of the batch, got {given!r}")
        self.given = given if isinstance(given, Tensor) else tuple(given)
        self._found: tuple[Bank, Tensor] | None = None

    def look_up(self, bank: Bank) -> Tensor:
        """The places [B] in `bank`'s tables, as the bank is now."""
        index = bank.index(self.given)
        self._found = (bank, index)
        return index

    def index(self, bank: Bank) -> Tensor:
        """As `look_up` found them for this call of the model."""
        found = self._found
        return found[1] if found is not None and found[0] is bank else self.look_up(bank)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One level of the context: the tasks (None: the active task's own values) and who opened it."""

    given: GivenTasks | None
    outer: _Entry | None
    model: nn.Module | None


class _Traced:
    """What tracing sees: the tasks given to the model being traced, and whether a `with` is open."""

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self.open = 0


_entry: contextvars.ContextVar[_Entry | None] = contextvars.ContextVar("tasks", default=None)
_traced = _Traced()
_counting = threading.Lock()


@contextlib.contextmanager
def tasks(names: BatchTasks) -> Iterator[None]:
    """Inside, every model with tasks computes row i of its batch by the task `names[i]`.

    Args:
        names: one a row (dimension 0) of the batch; None is the pretrained model. Or a tensor, as
            `TaskBank.index` makes it.

    Names are looked up when a model is called: there an unknown one is refused before anything runs. Only
    this thread (this coroutine) sees the context. A backward pass that computes activations again
    (gradient checkpointing) is refused. A compiled model takes `tasks` as an argument only.
    """
    token = _entry.set(_Entry(GivenTasks(names), None, None))
    with _counting:
        _traced.open += 1
    try:
        yield
    finally:
        with _counting:
            _traced.open -= 1
        _entry.reset(token)


def tasks_of_batch(bank: Bank | None) -> Tensor | None:
    """The running batch's tasks, as places [B] in `bank`'s tables; None where it names none.

    Raises:
        ValueError: tasks are named and the model has none, or none are named while all are trained.
    """
    index = None
    if torch.compiler.is_compiling():
        index = _traced.index
    else:
        entry = _entry.get()
        if entry is not None and entry.given is not None:
            if bank is None:
                raise ValueError(
                    "tasks are named for a model that has none: add_task(model, name) or "
                    "load_tasks(model, folders) first"
                )
            index = entry.given.index(bank)
    if index is None and bank is not None and bank.trained and torch.is_grad_enabled():
        raise ValueError(
            "the tables of all tasks are being trained and this batch names no tasks: pass tasks=[...]; "
            "layers that run again in the backward pass (gradient checkpointing) can't know them"
        )
    return index


def before_call(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a model with tasks: takes `tasks` from its arguments and looks them up."""
    bank: Bank = model.task_bank
    named = "tasks" in kwargs
    given = kwargs.get("tasks")
    rest = {name: value for name, value in kwargs.items() if name != "tasks"}
    if torch.compiler.is_compiling():
        if not named and _traced.open:
            raise ValueError(
                "a compiled model takes its tasks as an argument: model(..., tasks=index)"
            )
        if given is not None and not isinstance(given, Tensor):
            raise TypeError("a compiled model takes tasks=model.task_bank.index(names), a tensor")
        _traced.index = given
        return args, rest
    after_call(model)  # what an interrupted call (Ctrl-C in a notebook) left open
    if named:
        _entry.set(_Entry(None if given is None else GivenTasks(given), _entry.get(), model))
    entry = _entry.get()
    if entry is not None and entry.given is not None:
        _check_call(model, entry.given.look_up(bank), args, rest)
    return args, rest


def after_call(model: nn.Module, *_: Any) -> None:
    """Forward hook, run after failures too: closes what `before_call` opened."""
    if torch.compiler.is_compiling():
        _traced.index = None
        return
    entry = _entry.get()
    if entry is not None and entry.model is model:
        _entry.set(entry.outer)


def _check_call(model: Any, index: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
    if (
        torch.is_grad_enabled()
        and model.training
        and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    ):
        raise ValueError(
            "gradient checkpointing runs layers again in the backward pass, where the batch's tasks are "
            "not known any more: switch it off to name tasks, or train one task at a time by set_task()"
        )
    names = (getattr(model, "main_input_name", "input_ids"), "input_ids", "inputs_embeds")
    given = [kwargs[name] for name in names if kwargs.get(name) is not None] + list(args)
    batch = next((t for t in given if isinstance(t, Tensor) and t.dim() > 0), None)
    if batch is not None and len(batch) != len(index):
        raise ValueError(
            f"tasks must name one task a row: got {len(index)} for a batch of {len(batch)} "
            f"(input {list(batch.shape)})"
        )
