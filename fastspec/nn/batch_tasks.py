"""Which task each row of a batch belongs to: from the call of the model down to its layers.

In eager code a context variable carries it, so that threads and coroutines do not meet. `torch.compile`
can't trace context variables: there the tasks arrive as an argument of the model (a tensor), and the way
from the argument to the layers is traced, through `_traced`, and gone when the compiled code runs. What is
compiled inside a call or context whose tasks it can't see raises while it is traced: without fullgraph=True
PyTorch then runs it uncompiled, where it sees them.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastspec.nn.batch_rows import Rows
from fastspec.nn.parts import calls_running

BatchTasks = Sequence["str | None"] | Tensor


class Bank(Protocol):
    """What this module needs of a `TaskBank`, which is built on it."""

    model: nn.Module

    @property
    def trained(self) -> bool: ...

    def look_up(self, names: BatchTasks) -> Rows: ...
    def places(self, index: Tensor) -> Tensor: ...
    def begin(self, names: BatchTasks | None) -> tuple[Any, Rows | None]: ...
    def end(self, flight: Any) -> None: ...
    def learn_layouts(self, model: nn.Module, args: tuple, kwargs: dict, rows: Rows) -> None: ...


class GivenTasks:
    """The tasks of one batch as given."""

    def __init__(self, given: BatchTasks) -> None:
        if isinstance(given, str):
            raise TypeError(f"tasks must be a list of names, one a row of the batch, got {given!r}")
        self.given = given if isinstance(given, Tensor) else tuple(given)


class Generation:
    """One call of `generate`: how often each module is called with a prompt's rows repeated."""

    def __init__(self) -> None:
        self.repeats: dict[nn.Module, int] = {}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One level of the context: the tasks (None: the active task's own values) and who opened it."""

    given: GivenTasks | None
    outer: Entry | None
    model: nn.Module | None = None  # the one being called
    bank: Bank | None = None
    rows: Rows | None = None  # as looked up in `bank`
    flight: Any = None
    generation: Generation | None = None
    recorder: Callable[[nn.Module, Tensor], None] | None = None  # while rows are marked


class _Traced:
    """What tracing sees, and compiled code is guarded by.

    Attributes:
        began: whether the model's call began in compiled code.
        rows: the tasks given to it.
        named: whether a `with` is open, in any thread.
        calls: whether a call that names tasks runs uncompiled, in any thread.
    """

    def __init__(self) -> None:
        self.began = False
        self.rows: Rows | None = None
        self.named = self.calls = False
        self._counts = {"named": 0, "calls": 0}
        self._counting = threading.Lock()

    def count(self, what: str, change: int) -> None:
        with self._counting:
            self._counts[what] += change
            setattr(self, what, self._counts[what] > 0)

    def begin(self, rows: Rows | None) -> None:
        self.began, self.rows = True, rows

    def end(self) -> None:
        self.began, self.rows = False, None

    def check(self) -> None:
        """Refuse to go on compiled where tasks may be named that only uncompiled code sees."""
        if not self.began and (self.named or self.calls):
            raise ValueError(
                "compiled code can't see the tasks of a batch that are named outside of it: compile the "
                "whole model, and call it with tasks=model.task_bank.index(names)"
            )


_entry: contextvars.ContextVar[Entry | None] = contextvars.ContextVar("tasks", default=None)
_traced = _Traced()


@contextlib.contextmanager
def tasks(names: BatchTasks) -> Iterator[None]:
    """Inside, every model with tasks computes row i of its batch by the task `names[i]`.

    Args:
        names: one a row (dimension 0) of the batch, under `generate` one a prompt; None is the pretrained
            model. Or a tensor, as `TaskBank.index` makes it.

    Names are looked up when a model is called: there an unknown one is refused before anything runs. Only
    this thread (this coroutine) sees the context. A backward pass that computes activations again
    (gradient checkpointing) is refused. A compiled model takes `tasks` as an argument only.
    """
    _traced.count("named", 1)
    try:
        with opened(Entry(GivenTasks(names), _entry.get())):
            yield
    finally:
        _traced.count("named", -1)


@contextlib.contextmanager
def opened(entry: Entry) -> Iterator[None]:
    token = _entry.set(entry)
    try:
        yield
    finally:
        _entry.reset(token)


def current() -> Entry | None:
    return _entry.get()


def tasks_of_batch(
    bank: Bank | None, layer: nn.Module | None = None, x: Tensor | None = None
) -> Rows | None:
    """The running batch's tasks, as places in `bank`'s tables; None where it names none.

    Args:
        layer, x: who asks, and its input: for finding out how rows lie in it.

    Raises:
        ValueError: tasks are named and the model has none, or none are named while all are trained.
    """
    rows = None
    if torch.compiler.is_compiling():
        rows = _traced.rows
        if bank is not None:
            _traced.check()
    else:
        entry = _entry.get()
        if entry is not None:
            if entry.recorder is not None:
                if layer is not None and x is not None:
                    entry.recorder(layer, x)
                return None
            if entry.given is not None:
                if bank is None:
                    raise ValueError(
                        "tasks are named for a model that has none: add_task(model, name) or "
                        "load_tasks(model, folders) first"
                    )
                rows = entry.rows if entry.bank is bank else bank.look_up(entry.given.given)
        elif bank is not None:
            rows = _traced.rows  # of a compiled call that this part of runs uncompiled
    if rows is None and bank is not None and bank.trained and torch.is_grad_enabled():
        raise ValueError(
            "the tables of all tasks are being trained and this batch names no tasks: pass tasks=[...]; "
            "layers that run again in the backward pass (gradient checkpointing) can't know them"
        )
    return rows


def before_call(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a model with tasks: takes `tasks` from its arguments and looks them up.

    Also of parts that are called by themselves, such as the encoder in `generate`.
    """
    bank: Bank = model.task_bank
    named = "tasks" in kwargs
    given = kwargs.get("tasks")
    rest = {name: value for name, value in kwargs.items() if name != "tasks"}
    part = model is not bank.model
    if torch.compiler.is_compiling():
        if part:
            _traced.check()
            return args, kwargs
        if not named and _traced.named:
            raise ValueError(
                "a compiled model takes its tasks as an argument: model(..., tasks=index)"
            )
        if given is not None and not isinstance(given, Tensor):
            raise TypeError("a compiled model takes tasks=model.task_bank.index(names), a tensor")
        places = None if given is None else bank.places(given)
        _traced.begin(None if places is None else Rows(places, uniform=places.shape[0] == 1))
        return args, rest
    if not part:
        _traced.end()  # what an interrupted call left open
    after_call(model)  # what an interrupted call (Ctrl-C in a notebook) left open
    entry = _entry.get()
    if entry is not None and (entry.recorder is not None or (part and entry.model is not None)):
        return args, kwargs  # inside a call that knows its rows
    names = entry.given if entry is not None else None
    if named:
        names = None if given is None else GivenTasks(given)
    pinned = None  # by the generation that this call is part of
    if entry is not None and entry.bank is bank and not named:
        pinned = entry.rows
    flight, rows = bank.begin(names.given if names is not None and pinned is None else None)
    rows = rows if pinned is None else pinned
    try:
        if rows is not None:
            rows = _of_call(model, rows, entry, args, rest)
            bank.learn_layouts(model, args, rest, rows)
    except BaseException:
        bank.end(flight)
        raise
    _entry.set(Entry(names, entry, model, bank, rows, flight))
    if rows is not None:
        _traced.count("calls", 1)
    return args, rest


def after_call(model: nn.Module, *_: Any) -> None:
    """Forward hook, run after failures too: closes what `before_call` opened."""
    whole = model.task_bank.model is model  # type: ignore[union-attr]
    if torch.compiler.is_compiling():
        _traced.check()  # what began uncompiled ends so
        if whole:
            _traced.end()
        return
    entry = _entry.get()
    if whole and entry is None:
        _traced.end()  # the call began compiled, and its graph broke
    if entry is not None and entry.model is model and entry.recorder is None:
        _entry.set(entry.outer)
        if entry.rows is not None:
            _traced.count("calls", -1)
        entry.bank.end(entry.flight)  # type: ignore[union-attr]


def refuse_inside_call(bank: Bank) -> None:
    """What waits for batches in flight can't be done by one of them.

    Raises:
        ValueError: this thread is inside a call of the bank's model.
    """
    entry = _entry.get()
    while entry is not None:
        if entry.bank is bank:
            if entry.generation is None and not calls_running(entry.model):
                after_call(entry.model)  # type: ignore[arg-type] # an interrupted call
                entry = _entry.get()
                continue
            raise ValueError(
                "tasks can't be changed inside a call of their model, for which the change would wait: do it "
                "after the call"
            )
        entry = entry.outer


def count_rows(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[int, Tensor] | None:
    """Rows of a call's batch and the input that says so; None where no tensor does."""
    names = (
        getattr(model, "main_input_name", "input_ids"),
        "input_ids",
        "inputs_embeds",
        "decoder_input_ids",
        "decoder_inputs_embeds",
    )
    given = [kwargs[name] for name in names if kwargs.get(name) is not None] + list(args)
    batch = next((t for t in given if isinstance(t, Tensor) and t.dim() > 0), None)
    return None if batch is None else (len(batch), batch)


def _of_call(
    model: Any, rows: Rows, entry: Entry | None, args: tuple, kwargs: dict[str, Any]
) -> Rows:
    """The tasks of the rows of this call, under `generate` a prompt's for each of its rows."""
    if (
        torch.is_grad_enabled()
        and model.training
        and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    ):
        raise ValueError(
            "gradient checkpointing runs layers again in the backward pass, where the batch's tasks are "
            "not known any more: switch it off to name tasks, or train one task at a time by set_task()"
        )
    named = len(rows.task)
    counted = count_rows(model, args, kwargs)
    if counted is None:
        return rows
    count, batch = counted
    repeats, rest = divmod(count, max(named, 1))
    generation = entry.generation if entry is not None else None
    fits = generation is not None and rest == 0 and repeats > 0
    if fits and generation.repeats.setdefault(model, repeats) == repeats:  # type: ignore[union-attr]
        return rows.repeated(repeats)
    if count != named or generation is not None:
        raise ValueError(
            f"tasks must name one task a row: got {named} for a batch of {count} "
            f"(input {list(batch.shape)})"
        )
    return rows
