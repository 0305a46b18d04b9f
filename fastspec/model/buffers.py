"""What of a model moves beside its parameters: persistent buffers, and state that is no tensor."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastspec.fingerprint import tensor_fingerprint

DIGITS = 16  # of a SHA-256 in hexadecimal
EXTRA_STATE = "_extra_state"  # the name that PyTorch gives it in a state dict


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the buffers that a state dict holds."""
    for name, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield (f"{name}.{leaf}" if name else leaf), buffer


def buffer_digests(model: nn.Module) -> dict[str, str]:
    """The digests by which `Base.changed` knows later which persistent buffers moved.

    Those of modules' extra state too, under its name in a state dict.
    """
    digests = {
        name: tensor_fingerprint(buffer)[:DIGITS]
        for name, buffer in persistent_buffers(model)
        if buffer.device.type != "meta"
    }
    return digests | {name: _digest_of(state) for name, state in _extra_states(model)}


def check_extra_state(model: nn.Module, noted: Mapping[str, str]) -> None:
    """Refuse to save a model whose modules' extra state moved, which no file of tensors holds.

    Args:
        model: the base model.
        noted: its `buffer_digests` as it was.

    Raises:
        ValueError: it moved; the message names it.
    """
    for name, state in _extra_states(model):
        if name in noted and noted[name] != _digest_of(state):
            raise ValueError(
                f"{name} has changed since the model was adapted. It is an object that its module "
                "keeps (get_extra_state), which an adapter can't hold: nothing was written; torch.save("
                "model.state_dict(), path) keeps it"
            )


def is_unset_buffer(model: nn.Module, name: str) -> bool:
    """Whether a persistent buffer of that name is None at the moment, as one is that a first call makes."""
    owner, leaf = _owner(model, name)
    if owner is None or leaf in owner._non_persistent_buffers_set:
        return False
    return leaf in owner._buffers and owner._buffers[leaf] is None


def fill_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a buffer that is None (`is_unset_buffer`) a value, on the device of the model."""
    owner, leaf = _owner(model, name)
    assert owner is not None
    there = next(model.parameters(), value)
    owner._buffers[leaf] = value.to(there.device, copy=True)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path), leaf
    except AttributeError:
        return None, leaf


def is_extra_state(name: str) -> bool:
    """Whether an entry of a state dict is what a module keeps that is no tensor of its own."""
    return name.rpartition(".")[2] == EXTRA_STATE


def _extra_states(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names in a state dict and values of what modules keep besides (`get_extra_state`)."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield f"{name}.{EXTRA_STATE}".lstrip("."), module.get_extra_state()


def _digest_of(state: Any) -> str:
    """A digest of a module's extra state: equal ones have one. Empty of what can't be saved anywhere."""
    try:
        return hashlib.sha256(_told(state).encode()).hexdigest()[:DIGITS]
    except Exception:  # of a pickler, whatever the object raises
        return ""


def _told(state: Any) -> str:
    """Text that says what a value is."""
    if isinstance(state, Tensor):
        return tensor_fingerprint(state)
    if isinstance(state, Mapping):
        return f"{type(state)}{[(_told(key), _told(value)) for key, value in state.items()]}"
    if isinstance(state, list | tuple):
        return f"{type(state)}{[_told(value) for value in state]}"
    if isinstance(state, io.BytesIO):
        return _told(state.getvalue())
    if state is None or isinstance(state, str | bytes | bool | int | float | complex):
        return f"{type(state)}{state!r}"
    return hashlib.sha256(pickle.dumps(state)).hexdigest()
