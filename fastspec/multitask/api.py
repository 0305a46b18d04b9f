"""The public functions of many tasks on one model; `TaskBank` does the work."""

from __future__ import annotations

import collections
import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from fastspec.files import ADAPTER_FILE
from fastspec.model.adapter import read_adapters, spectralize_for
from fastspec.model.adapter_basis import Adapters
from fastspec.model.adapter_file import AdapterError
from fastspec.model.targets import spectral_layers, unwrap
from fastspec.multitask.bank import TaskBank, check_name
from fastspec.multitask.tables import (
    CAPACITY,
    MAX_BYTES,
    capacity_for,
    check_bytes,
    output_tensors,
)


def task_bank(
    model: nn.Module,
    capacity: int | None = None,
    head_size: int = 0,
    *,
    max_bytes: int | None = None,
) -> TaskBank:
    """The model's bank of tasks, made now if it has none.

    Args:
        model: a spectralized model.
        capacity: make room for this many tasks.
        head_size: make room for output heads of this size (number of labels): wider tasks that come within
            it change no tables. Logits of mixed batches are that wide, -inf beyond a task's own.
        max_bytes: the most that the tables may take from now on; of a new bank 4 GiB.

    Raises:
        ValueError: the model is no spectralized one, or the tables would take more than `max_bytes`.
    """
    model = unwrap(model)
    bank: TaskBank | None = getattr(model, "task_bank", None)
    if bank is None:
        return TaskBank(
            model,
            CAPACITY if capacity is None else capacity,
            head_size,
            max_bytes=MAX_BYTES if max_bytes is None else max_bytes,
        )
    if max_bytes is not None:
        bank.tables.max_bytes = max_bytes
    if capacity is not None or head_size:
        bank.reserve(capacity or 0, head_size)
    return bank


def add_task(
    model: nn.Module,
    name: str,
    source: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    *,
    current: bool = False,
) -> TaskBank:
    """Give a model a new task.

    Args:
        model: a spectralized model; with a folder also the plain base model, which is then adapted by
            the folder's config.
        name: the task's.
        source: an adapter folder, or tensors by the names an adapter folder has; what they lack, and
            everything where `source` is None, starts as the pretrained model's. The output layer of a
            head may be of another size than the model's.
        current: take the values that the model holds now (it was trained before it had tasks); the new
            task is then the active one.

    Returns:
        The model's bank.

    Raises:
        ValueError: the name is taken, a tensor does not fit, or `current` with a `source`.
        FileNotFoundError, AdapterError: as `load_adapter`. The model is unchanged.
    """
    check_name(name, list_tasks(model))
    if current:
        if source is not None:
            raise ValueError("current=True takes the model's own values: it goes without a source")
        bank = task_bank(model)
        bank.adopt(name)
        return bank
    if isinstance(source, (str, os.PathLike)):
        return load_tasks(model, [source], name=lambda folder: name)
    bank = task_bank(model)
    bank.add({name: source or {}})
    return bank


def set_task(model: nn.Module, name: str | None) -> None:
    """Let the model's own parameters hold a task's values, copied in place; None: the pretrained ones.

    What the task that was active until now has learnt is kept. A head of another size gets new parameters
    (and `model.num_labels`): make the optimiser afterwards.

    Raises:
        ValueError: no such task, or the model is merged or holds trained values of no task.
    """
    _bank_of(model).activate(name)


def replace_task(
    model: nn.Module, name: str, source: str | os.PathLike[str] | Mapping[str, Tensor]
) -> None:
    """Other values for a task: serving goes on without recompiling.

    Batches that run at the same time keep the former values to their end.

    Raises:
        ValueError, FileNotFoundError, AdapterError: as `add_task`, or there is no such task.
    """
    bank = _bank_of(model)
    if isinstance(source, (str, os.PathLike)):
        _, (source,) = _read(model, [source])
    bank.replace(name, source)


def remove_task(model: nn.Module, name: str) -> None:
    """Forget a task; if it was the active one, the model holds the pretrained values afterwards.

    Raises:
        ValueError: no such task.
    """
    _bank_of(model).remove(name)


def list_tasks(model: nn.Module) -> list[str]:
    """Names of a model's tasks, in the order they came."""
    bank: TaskBank | None = getattr(unwrap(model), "task_bank", None)
    return list(bank or ())


def load_tasks(
    model: nn.Module,
    folders: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    name: Callable[[Path], str] = lambda folder: folder.name,
    max_bytes: int | None = None,
) -> TaskBank:
    """Load many adapter folders as tasks, all or none.

    Args:
        model: the plain base model, which is then adapted by the folders' config, or one adapted alike.
        folders: a pattern such as "runs/*" (matches that are no adapter folders are passed over), or
            the folders themselves. As much of a pattern's path as exists by that very name is no
            pattern: "run [1]/*" means every folder in `run [1]`.
        name: a task's name from its folder; the default is the folder's own.
        max_bytes: as in `task_bank`: a folder brings a head of a size of its own, and the tables have
            room for the widest once for every task.

    Returns:
        The model's bank.

    Raises:
        FileNotFoundError: nothing matches, or a folder lacks a file.
        AdapterError: a folder does not fit this model or the others; nothing was loaded.
        ValueError: two folders of one name, or one that is taken; tables larger than `max_bytes`.
    """
    if isinstance(folders, (str, os.PathLike)):
        found = [f for f in _matches(folders) if os.path.isfile(f / ADAPTER_FILE)]
        if not found:
            raise FileNotFoundError(f"{folders}: no adapter folder there")
    else:
        found = [Path(folder) for folder in folders]
        if not found:
            raise ValueError("folders is empty")
    names = [name(folder) for folder in found]
    twice = [n for n, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"two of the folders are named {twice[0]!r}: tell them apart, as by "
            "name=lambda folder: folder.parent.name"
        )
    model = unwrap(model)
    taken = list_tasks(model)
    for task in names:
        check_name(task, taken)
    adapters, tensors = _read(model, found)
    if getattr(model, "task_bank", None) is None:
        _check_room(model, tensors, MAX_BYTES if max_bytes is None else max_bytes)
    if next(spectral_layers(model), None) is None:
        spectralize_for(model, adapters, found[0])
    bank = task_bank(model, max_bytes=max_bytes)
    bank.add(dict(zip(names, tensors, strict=True)))
    return bank


def _matches(pattern: str | os.PathLike[str]) -> list[Path]:
    path = Path(pattern)
    there = next((p for p in (path, *path.parents) if os.path.exists(p)), Path())
    inside = path.relative_to(there)
    if inside == Path():
        return [path]
    return sorted(there / match for match in glob.glob(str(inside), root_dir=there))


def _read(
    model: nn.Module, folders: Sequence[str | os.PathLike[str]]
) -> tuple[Adapters, list[dict[str, Tensor]]]:
    """`read_adapters` with heads of any size."""
    outputs: dict[str, str] = {}

    def sizes_free(heads: Sequence[str]) -> dict[str, str]:
        outputs.update(output_tensors(model, heads))
        return outputs

    found = read_adapters(model, folders, sizes_free)
    for folder, tensors in zip(folders, found.tensors, strict=True):
        sizes: dict[str, int] = {}
        for name, layer in outputs.items():
            if sizes.setdefault(layer, len(tensors[name])) != len(tensors[name]):
                raise AdapterError(f"{folder}: the tensors of {layer} are not of one size")
    return found, found.tensors


def _check_room(model: nn.Module, tasks: Sequence[Mapping[str, Tensor]], limit: int) -> None:
    """`check_bytes` of the tables these tasks need, for a model that has no bank yet."""
    own = model.state_dict()
    widest = [max(t[name].nbytes for t in (*tasks, own) if name in t) for name in tasks[0]]
    capacity = capacity_for(len(tasks))
    check_bytes(capacity * sum(widest), capacity, limit)


def _bank_of(model: nn.Module) -> TaskBank:
    bank: TaskBank | None = getattr(unwrap(model), "task_bank", None)
    if bank is None:
        raise ValueError(
            "the model has no tasks: add_task(model, name) or load_tasks(model, folders) first"
        )
    return bank
