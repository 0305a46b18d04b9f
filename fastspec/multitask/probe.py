"""How the rows of a batch lie in the input of every layer: marked rows, and where the marks arrive.

The model is called a few times with the inputs of one batch, without tasks. In every call some rows are
marked: noise is added to what the batch brings in floating point and to what its tokens are embedded as.
Each row has a set of calls of its own, all of one size, so an entry of a layer's input that changes in
just the calls of row b depends on row b and on no other.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastspec.multitask.flights import Flights
from fastspec.nn.batch_rows import LAYOUTS, Layout, by_rows
from fastspec.nn.batch_tasks import Entry, current, opened

PROJECTIONS = 4  # numbers that stand for one vector of a layer's input
NO_ROWS = ("mask", "pos", "bias")  # in the names of arguments that say nothing of a row's contents


class KnownLayouts:
    """Which kinds of calls of which modules were probed; the layouts stand on the layers themselves."""

    def __init__(self, flights: Flights) -> None:
        self._flights = flights
        self._calls: dict[nn.Module, set[tuple]] = {}

    def learn(
        self,
        model: nn.Module,
        args: tuple,
        kwargs: Mapping[str, Any],
        count: int,
        by_task: Callable[[], Iterable[nn.Module]],
    ) -> None:
        """Find out where the `count` rows lie in every layer's input, once for every kind of call.

        Args:
            by_task: gives the modules inside which a batch has one task at a time.

        Raises:
            ValueError: rows can't be told apart in some layer.
        """
        kind = signature(args, kwargs)
        if kind in self._calls.get(model, ()):
            return
        with self._flights.probing:
            if kind in self._calls.setdefault(model, set()):
                return
            found = seen_layouts(model, args, kwargs, count)
            exempt = {m for module in by_task() for m in module.modules()}
            for layer, layouts in found.items():
                if None in layouts and layer not in exempt:
                    names = {module: name for name, module in model.named_modules()}
                    raise ValueError(
                        f"{names[layer]}: whose rows are where in the input of this layer can't be told: "
                        "rows meet in it, it is the same for all rows, or values decide where rows go. A "
                        "batch of one task (the same name for every row) is right all the same, and so is "
                        "set_task()"
                    )
            for layer, layouts in found.items():
                own: Any = layer
                known = {*(own.row_layouts or ()), *layouts} - {None}
                own.row_layouts = tuple(sorted(known))
            self._calls[model].add(kind)


def signature(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """What decides how a model treats its inputs, but for their sizes: a new one is probed anew."""
    return (*map(_kind, args), *((name, _kind(v)) for name, v in sorted(kwargs.items())))


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(min(n, 2) for n in value.shape)
    if isinstance(value, (bool, str, type(None))):
        return value
    if isinstance(value, Mapping):
        return type(value), tuple((name, _kind(v)) for name, v in value.items())
    return type(value)


class Seen:
    """The inputs of layers in one call, every vector by a few numbers that change when it does."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[tuple[torch.Size, Tensor, Tensor]]] = {}
        self._mixers: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, layer: nn.Module, x: Tensor) -> None:
        x = x.detach()
        wide = x.float()
        key = (x.shape[-1], x.device)
        if key not in self._mixers:
            g = torch.Generator().manual_seed(0)
            self._mixers[key] = torch.randn(x.shape[-1], PROJECTIONS, generator=g).to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            prints = wide @ self._mixers[key]
        # bfloat16's rounding by a neighbour's products is no mark, noise of the input's own size is
        slack = wide.norm(dim=-1, keepdim=True) * math.sqrt(torch.finfo(x.dtype).eps)
        self.calls.setdefault(layer, []).append((x.shape, prints, slack))


class _MarkedEmbeddings(TorchFunctionMode):
    """Inside, embedded tokens of marked rows come out with noise added."""

    def __init__(self, marked: Tensor, given: list[Tensor]) -> None:
        super().__init__()
        self.marked, self.given = marked, given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.embedding or func is torch.embedding:
            ids = kwargs.get("input", args[0])
            if func is torch.embedding:
                ids = kwargs.get("indices", args[1] if len(args) > 1 else ids)
            rows = self._rows(ids)
            if rows is not None:
                out = _noisy(out, rows)
        return out

    def _rows(self, ids: Tensor) -> Tensor | None:
        """Which of these tokens are of a marked row, [*ids.shape]; None where that can't be said."""
        marked, count = self.marked.to(ids.device), len(self.marked)
        found: dict[str, Tensor] = {}
        for own in self.given:
            per_token = marked.view(-1, *(1,) * (own.dim() - 1)).expand(own.shape)
            ways = [("batch", own, per_token)]
            if own.dim() == 2:
                ways.append(("second", own.mT, per_token.mT))
            ways.append(("blocks", own.reshape(-1), per_token.reshape(-1)))
            for way, tokens, rows in ways:
                if tokens.shape == ids.shape and torch.equal(tokens, ids):
                    found.setdefault(way, rows)
            # a decoder's tokens made from those of the encoder
            if own.dim() == 2 and own.shape == ids.shape and torch.equal(ids[:, 1:], own[:, :-1]):
                found.setdefault("batch", per_token)
        if len(found) == 1:
            return next(iter(found.values()))
        # other tokens made inside the model
        if not found and ids.dim() == 2 and ids.shape[0] == count != ids.shape[1]:
            return marked[:, None].expand(ids.shape)
        return None


def _noisy(x: Tensor, marked: Tensor) -> Tensor:
    """`x` [*marked.shape, ...] with noise of its own size where marked."""
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(x.shape, generator=g, dtype=torch.float32).to(x.device)
    size = x.float().square().mean().sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    where = marked.to(x.device).view(*marked.shape, *(1,) * (x.dim() - marked.dim()))
    return torch.where(where, x.float() + size * noise, x.float()).to(x.dtype)


def _marked_input(value: Any, marked: Tensor) -> Any:
    """An argument with its marked rows changed; what can change in a call is copied."""
    if isinstance(value, Tensor):
        per_row = value.dim() >= 2 and len(value) == len(marked)
        return _noisy(value, marked) if per_row and value.is_floating_point() else value
    if isinstance(value, Mapping):
        made = {name: _marked_input(v, marked) for name, v in value.items()}
        return type(value)(**made) if hasattr(value, "to_tuple") else made
    if type(value) in (list, tuple):
        return type(value)(_marked_input(v, marked) for v in value)
    return copy.deepcopy(value)


def codes(count: int) -> Tensor:
    """The calls in which each row is marked, bool [calls, count]: half of them, other ones for each row."""
    calls = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= count)
    sets = itertools.islice(itertools.combinations(range(calls), calls // 2), count)
    table = torch.zeros(calls, count, dtype=torch.bool)
    for row, chosen in enumerate(sets):
        table[list(chosen), row] = True
    return table


@torch.no_grad()
def seen_layouts(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any], count: int
) -> dict[nn.Module, set[Layout | None]]:
    """How the rows of this batch of `count` came to each layer; None: in a way that is none of `LAYOUTS`."""
    table = codes(count)
    given = [
        v
        for v in (*args, *kwargs.values())
        if isinstance(v, Tensor) and not v.is_floating_point() and v.dim() > 0 and len(v) == count
    ]
    runs = []
    with _in_eval_mode(model):
        for marked in (torch.zeros(count, dtype=torch.bool), *table):
            seen = Seen()
            call_args = tuple(_marked_input(v, marked) for v in args)
            call_kwargs = {
                name: copy.copy(v) if any(n in name for n in NO_ROWS) else _marked_input(v, marked)
                for name, v in kwargs.items()
            }
            bank: Any = model.task_bank
            entry = Entry(None, current(), model, bank, recorder=seen)
            with opened(entry), _MarkedEmbeddings(marked, given):
                model(*call_args, **call_kwargs)
            runs.append(seen.calls)
    layouts: dict[nn.Module, set[Layout | None]] = {}
    for layer in {layer: None for calls in runs for layer in calls}:
        all_runs = [calls.get(layer, []) for calls in runs]
        found = layouts.setdefault(layer, set())
        if len({tuple(shape for shape, _, _ in calls) for calls in all_runs}) > 1:
            found.add(None)  # entries go where their values send them
            continue
        for base, *others in zip(*all_runs, strict=True):
            changed = [_changed(base, other) for other in others]
            found.add(_layout(base[0], changed, table))
    return layouts


def _changed(base: tuple, other: tuple) -> Tensor:
    """Which vectors of a layer's input changed, bool [n, ...]."""
    slack = torch.maximum(base[2], other[2])
    return ((base[1] - other[1]).abs() > slack).any(-1)


def _layout(shape: torch.Size, changed: list[Tensor], table: Tensor) -> Layout | None:
    count = table.shape[1]
    for layout in LAYOUTS:
        if not _possible(shape, count, layout):
            continue
        if all(
            torch.equal(by_rows(c, count, layout).reshape(count, -1).any(1).cpu(), marked)
            for c, marked in zip(changed, table, strict=True)
        ):
            return layout
    return None


def _possible(shape: torch.Size, count: int, layout: Layout) -> bool:
    if layout == "second":
        return len(shape) >= 3 and shape[1] == count
    if layout == "batch":
        return len(shape) >= 2 and shape[0] == count
    return len(shape) >= 2 and shape[0] > count and shape[0] % count == 0


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, and no running statistics that move."""
    training: Iterable[nn.Module] = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
