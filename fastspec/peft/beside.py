"""What PEFT's files hold beside the coefficients: sketches of the bases, and what else is trained or moves.

A sketch tells an update from that between other vectors (`fastspec.svd.sketch`); it travels with the
coefficients, as `<layer>.fastspec_sketch`. Whatever else is trained, or moves, is there under its own name.

Of a base model's tensors there is one each for all adapters, so such an adapter is the only one of its model.
What every adapter needs for itself belongs in `modules_to_save`, of which PEFT makes copies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fastspec.files import excerpt
from fastspec.fingerprint import tensor_fingerprint
from fastspec.model.adapter_file import AdapterError
from fastspec.model.buffers import (
    DIGITS,
    buffer_digests,
    check_extra_state,
    fill_buffer,
    is_unset_buffer,
)
from fastspec.peft.conversion import PREFIX
from fastspec.peft.layer import SpectralLinear
from fastspec.svd.sketch import TOLERANCE, distance, probed, sketch

NOTE = "fastspec_beside"
DELTA = ".fastspec_delta"
SKETCH = ".fastspec_sketch"


@dataclasses.dataclass
class Beside:
    """What a base model with adapters notes of itself: see `changed_beside`."""

    buffers: dict[str, str]  # digests of the persistent buffers as they were without adapters
    brought: set[str]  # parameters that an adapter brought, by their names in the base model


def note_buffers(model: nn.Module) -> None:
    """Let a base model, which has no adapters yet, know its persistent buffers as they are now."""
    model.__dict__[NOTE] = Beside(buffer_digests(model), set())


def note_brought(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let it know which parameters of it an adapter brings, so that they are saved with that again."""
    given = {name.removeprefix(PREFIX) for name in tensors}
    own = {
        n.removeprefix(PREFIX)
        for n, t in base_tensors(model).items()
        if isinstance(t, nn.Parameter)
    }
    _note(model).brought |= given & own


def fill_buffers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the buffers that an adapter brings and the model has not made yet."""
    base = base_model_of(model)
    for name, tensor in tensors.items():
        plain = name.removeprefix(PREFIX)
        if is_unset_buffer(base, plain):
            fill_buffer(base, plain, tensor)


def base_model_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _note(model: nn.Module) -> Beside:
    note: Beside = base_model_of(model).__dict__.setdefault(NOTE, Beside({}, set()))
    return note


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers that are no adapter's, by the names of the state dict."""
    found: dict[str, Tensor] = {}

    def visit(name: str, module: nn.Module) -> None:
        if isinstance(module, AuxiliaryTrainingWrapper):
            return
        prefix = f"{name}." if name else ""
        buffers = {
            leaf: buffer
            for leaf, buffer in module._buffers.items()
            if leaf not in module._non_persistent_buffers_set
        }
        for leaf, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                found[prefix + leaf] = tensor
        for leaf, child in module._modules.items():
            if child is not None and not (
                isinstance(module, SpectralLinear) and leaf != "base_layer"
            ):
                visit(prefix + leaf, child)

    visit("", model)
    return found


def changed_beside(model: nn.Module) -> list[str]:
    """Names, as in the state dict, of base parameters that are trained and of buffers that moved.

    Raises:
        ValueError: the weight of an adapted layer is trained, or a module's extra state moved; the message
            names it.
    """
    note = _note(model)
    check_extra_state(base_model_of(model), note.buffers)
    found = []
    for name, tensor in base_tensors(model).items():
        plain = name.removeprefix(PREFIX)
        if not isinstance(tensor, nn.Parameter):
            if note.buffers.get(plain) == tensor_fingerprint(tensor)[:DIGITS]:
                continue
        elif not tensor.requires_grad and plain not in note.brought:
            continue
        elif name.endswith(".base_layer.weight"):
            raise ValueError(
                f"{name} is trainable, and the layer's basis is made from it, so that the adapter could not "
                "be loaded: freeze it, or name the layer in modules_to_save instead of adapting it"
            )
        found.append(name)
    return found


def sketches(model: nn.Module, adapter: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sketches [8] of an adapter whose coefficients are in `state`, by names like theirs."""
    found = {}
    for name, layer in _layers_of(model, adapter):
        delta = state.get(f"{name}{DELTA}.{adapter}")
        if delta is not None and delta.device.type != "meta":
            found[f"{name}{SKETCH}.{adapter}"] = _sketch(layer, adapter, delta)
    return found


def check_sketches(model: nn.Module, adapter: str, state: dict[str, Tensor]) -> None:
    """Compare an adapter's sketches with what its coefficients do here, and take them out of `state`.

    Args:
        model: with the adapter, and its bases.
        adapter: its name.
        state: of its file, where names have no adapter's name; without sketches nothing is compared.

    Raises:
        AdapterError: the update of a layer is another one.
    """
    told = {name: state.pop(name) for name in list(state) if name.endswith(SKETCH)}
    told = {name.removeprefix(PREFIX): tensor for name, tensor in told.items()}
    deltas = {n.removeprefix(PREFIX): t for n, t in state.items() if n.endswith(DELTA)}
    for name, layer in _layers_of(model, adapter):
        name = name.removeprefix(PREFIX)
        own, delta = told.get(f"{name}{SKETCH}"), deltas.get(f"{name}{DELTA}")
        if own is None or delta is None:
            continue
        # what does not fit, or is not finite, is refused by what loads it
        fits = delta.shape == layer.fastspec_delta[adapter].shape
        if not (fits and bool(torch.isfinite(delta).all())):
            continue
        off = float(distance(own.cpu(), _sketch(layer, adapter, delta)))
        if not off <= TOLERANCE:
            raise AdapterError(
                f"the basis of {excerpt(name)} here is another one than the adapter's: its update differs by "
                f"{off:.0%}, where rounding differs by less than {TOLERANCE:.0%}: the weight has tied "
                "singular values, whose vectors depend on threads and machine. Where it was trained, "
                "fastspec.peft.save_as_lora writes the same update with its vectors"
            )


def _layers_of(model: nn.Module, adapter: str) -> list[tuple[str, SpectralLinear]]:
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, SpectralLinear) and adapter in layer.fastspec_basis
    ]


def _sketch(layer: SpectralLinear, adapter: str, delta: Tensor) -> Tensor:
    f = layer.factors_as_made(adapter)
    return sketch(probed(f.u, f.vh), delta.to(f.u.device), layer.fastspec_form[adapter].core)


def check_alone(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what would change the base below other adapters, or an adapter that needs another base.

    Raises:
        AdapterError: the model has other adapters, and a tensor of the base is another for this one.
    """
    if not set(getattr(model, "peft_config", {})) - {adapter}:
        return
    given = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    have = {name.removeprefix(PREFIX): t for name, t in base_tensors(model).items()}
    moved = {name.removeprefix(PREFIX) for name in changed_beside(model)}
    for name, tensor in have.items():
        brought = given.get(name)
        if brought is None:
            same = name not in moved or isinstance(tensor, nn.Parameter)
        else:
            same = brought.shape == tensor.shape and torch.equal(brought.to(tensor), tensor)
        if not same:
            raise AdapterError(
                f"the adapter {adapter!r} was trained with another {name} than the model's adapters, and a "
                "model has one for all of them: load it into a model of its own, or train with its module "
                "in modules_to_save"
            )
