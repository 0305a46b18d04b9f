"""Launches kept by number, to be repeated on other addresses: all else of a call is what it was.

A record is made from what the ordinary way passed to Triton once. Whoever repeats it vouches for the same
sizes, strides, dtypes, device, and addresses on 16 bytes where they were (csrc/cuda_choices.h): then Triton
would find the same compiled kernel and pass the same numbers. Its look-up, and its hooks, are left out.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from triton.runtime import driver

from fastspec.kernels import arrival
from fastspec.kernels.launch import Launch

# where csrc/cuda_operators.cpp puts the address of a kernel's operand; an absent one gets any valid address
FORWARD = {
    **{"x": 0, "task": 0, "precomputed": 0, "w": 1, "bias": 2, "u": 3, "vh": 4, "delta": 5},
    **{"y": 6, "p": 7},
}
BACKWARD = {
    **{"g": 0, "task": 0, "precomputed": 0, "p": 1, "w": 2, "u": 3, "vh": 4, "delta": 5},
    **{"dx": 6, "shares": 7, "grad": 8, "arrived": 6},
}
REDUCTION = {"q": 0, "p": 1, "shares": 2, "grad": 3, "arrived": 3}  # of csrc/cuda_reduce.cpp
ARRIVED = "arrived_ptr"  # a counter that no other launch at work may have
MOST = 8192  # twice as many as are remembered there
MOST_ADDRESSES = 1024  # of descriptors, an operand

_records: dict[int, Callable[[Sequence[int]], None]] = {}
_numbers = itertools.count(1)


def start(record: int, addresses: Sequence[int]) -> None:
    """Repeat a launch on these addresses, in the order that it was kept with."""
    _records[record](addresses)


def keep(launches: Sequence[Launch], order: dict[str, int]) -> tuple[int, int, int] | None:
    """The number of a new record, the slots of the partial sums that its kernel writes, whether it sums them.

    None where there is not exactly one launch, or nothing that could be repeated.
    """
    if len(launches) != 1:
        return None
    launch = launches[0]
    made = _repeatable(launch, order)
    if made is None:
        return None
    number = next(_numbers)
    _records[number] = made
    _records.pop(number - MOST, None)
    has_shares = launch.operands.get("GRAD", "shares_ptr" in launch.operands)
    slots = len(launch.operands["shares_ptr"]) if has_shares else 0
    return number, slots, int(_summed(launch))


def _summed(launch: Launch) -> bool:
    """Whether its programs are counted, for the last one to sum."""
    return bool(launch.operands.get("SUMMED", ARRIVED in launch.operands))


def _repeatable(launch: Launch, order: dict[str, int]) -> Callable[[Sequence[int]], None] | None:
    compiled = launch.compiled
    if not hasattr(compiled, "packed_metadata"):  # nothing was compiled: Triton interprets
        return None
    names = launch.kernel.arg_names
    operands = [launch.operands[name] for name in names]
    # a kernel's operands in memory come first: descriptors, then pointers
    described = sum(hasattr(operand, "block_shape") for operand in operands)
    in_memory = described + sum(isinstance(operand, torch.Tensor) for operand in operands)
    known = [name.removesuffix("_ptr").removesuffix("_desc") for name in names[:in_memory]]
    if not all(name in order for name in known):  # another kernel than the order is of
        return None
    places = [order[name] for name in known]
    run, maps = compiled.run, []
    if described:
        metadata = getattr(compiled.metadata, "tensordesc_meta", None)
        unwrapped = _without_wrapper(run)
        if not metadata or unwrapped is None:
            return None
        run = unwrapped
        maps = [_maps(*pair) for pair in zip(operands[:described], metadata, strict=True)]
    rest = tuple(operands[in_memory:])
    if any(isinstance(operand, torch.Tensor) for operand in rest):
        return None
    grid = (*launch.grid, 1, 1)[:3]
    active = driver.active
    device, stream_of = active.get_current_device(), active.get_current_stream
    function, packed = compiled.function, compiled.packed_metadata
    pick = itemgetter(*places)

    next_counter = None
    if _summed(launch):
        name, counter = names[in_memory - 1], operands[in_memory - 1]
        if name != ARRIVED:
            return None
        next_counter = functools.partial(arrival.counter, counter.device)

    def pointers(addresses: Sequence[int]) -> tuple:
        if next_counter is None:
            return pick(addresses)
        return *pick(addresses)[:-1], next_counter().data_ptr()

    def plain(addresses: Sequence[int]) -> None:
        stream = stream_of(device)
        run(*grid, stream, function, packed, None, None, None, *pointers(addresses), *rest)

    if not described:
        return plain
    pick = itemgetter(*places[described:])
    sources = list(zip(maps, places[:described], strict=True))

    def by_tma(addresses: Sequence[int]) -> None:
        all_of: list[Any] = []
        for found, place in sources:
            all_of += found[addresses[place]]
        stream = stream_of(device)
        run(*grid, stream, function, packed, None, None, None, *all_of, *pointers(addresses), *rest)

    return by_tma


def _without_wrapper(launcher: Any) -> Any:
    """Triton's launcher of one kernel without what turns descriptors into the driver's; None if unknown."""
    wrapper = launcher.launch
    cells = getattr(wrapper, "__closure__", None) or ()
    found = dict(zip(wrapper.__code__.co_freevars, cells, strict=True)) if cells else {}
    if "launcher" not in found:
        return None
    bare = copy.copy(launcher)
    bare.launch = found["launcher"].cell_contents
    return bare


class _Address:
    """As much of a tensor as a descriptor's base has to be."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Maps(dict):
    """Address -> what stands for an operand's descriptor among a kernel's arguments, made once.

    It depends on nothing else: sizes, strides and tile are the record's.
    """

    def __init__(self, make: Callable[[int], list]) -> None:
        self.make = make

    def __missing__(self, address: int) -> list:
        if len(self) >= MOST_ADDRESSES:
            self.clear()
        found = self[address] = self.make(address)
        return found


def _maps(descriptor: Any, metadata: Any) -> _Maps:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    template = copy.copy(descriptor)
    template.base = None  # holds no memory
    template.shape, template.strides = tuple(descriptor.shape), tuple(descriptor.strides)
    more = (None,) * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)

    def make(address: int) -> list:
        one = copy.copy(template)
        one.base = _Address(address)
        return make_tensordesc_arg(one, metadata, *more)

    return _Maps(make)
