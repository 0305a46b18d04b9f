"""The kept copies of a model compared and made again at once, as its forward begins.

`fastspec.keep_merged(model)` puts two hooks around the model's forward. The first compares and makes the
copies of all layers that had one in the forward before; on a GPU that is one launch for each kind of layer.
Inside the forward a layer trusts its copy once. Everywhere else it compares for itself: called on its own or
a second time, with coefficients of another version, when checkpointing computes it again in the backward, in
another thread.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastspec.nn.shared_input import Fresh, SharedForward, Sharing, version
from fastspec.ops.kept import keep_together

if TYPE_CHECKING:
    from fastspec.nn.kept_weight import KeptWeight


class Together:
    """The layers of one model that have copies."""

    def __init__(self) -> None:
        self.layers: dict[int, weakref.ref[Any]] = {}  # by id
        self.addresses: tuple = ()
        self.copies: list[KeptWeight] = []  # which the addresses are of
        self.keep: Callable[[], None] | None = None
        self.captured: list[Callable[[], None]] = []  # CUDA graphs read their tables
        self.sharing = Sharing()

    def refresh(self) -> Fresh:
        """Make all copies right for their coefficients: by the layer's id, which and for which version."""
        members = self._members()
        if not members:
            self.addresses, self.copies, self.keep = (), [], None
            return {}
        copies = [layer._kept for layer in members]
        in_capture = capturing(copies[0].made_for)
        addresses = tuple(
            kept.addresses(layer) for layer, kept in zip(members, copies, strict=True)
        )
        if addresses != self.addresses:
            if in_capture:
                return {}
            self.addresses, self.copies = addresses, copies
            pairs = zip(members, copies, strict=True)
            self.keep = keep_together([kept.operands(layer) for layer, kept in pairs])
        assert self.keep is not None
        self.keep()
        if in_capture and self.keep not in self.captured:
            self.captured.append(self.keep)
        fresh: Fresh = {}
        for layer, kept in zip(members, copies, strict=True):
            kept.version = version(layer.delta)
            kept.captured = kept.captured or in_capture
            fresh[id(layer)] = kept, kept.version
        return fresh

    def in_capture(self) -> bool:
        """Whether a CUDA graph is being captured: then nothing moves."""
        return bool(self.copies) and capturing(self.copies[0].made_for)

    def _members(self) -> list[Any]:
        """The layers that have a copy now and would use it, in the order in which they were first called."""
        found = []
        for key, ref in list(self.layers.items()):
            layer = ref()
            if layer is None or isinstance(layer._kept, (tuple, type(None))):
                self.layers.pop(key, None)
            elif (
                not layer.merged
                and layer.forced_plan is None
                and not torch.is_autocast_enabled(layer.weight.device.type)
                and layer._kept.serves(layer)
            ):
                found.append(layer)
        return found


@dataclasses.dataclass
class _Forward:
    """A forward that is under way."""

    model: nn.Module
    together: Together
    fresh: Fresh
    shared: SharedForward


class _UnderWay(threading.local):
    def __init__(self) -> None:
        self.forwards: list[_Forward] = []


_under_way = _UnderWay()
_known: weakref.WeakKeyDictionary[nn.Module, Together] = weakref.WeakKeyDictionary()


def install(model: nn.Module) -> None:
    """Let the copies of the model's layers be made again together."""
    if _before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before)
        model.register_forward_hook(_after, always_call=True)


def remove(model: nn.Module) -> None:
    """Take the hooks off, copied and unpickled ones too."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_before, _after)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    _known.pop(model, None)


def trusts(layer: Any, kept: KeptWeight, version: int) -> bool:
    """Whether this copy was made right for this version as the forward began; true once a forward."""
    forwards = _under_way.forwards
    return bool(forwards) and forwards[-1].fresh.pop(id(layer), None) == (kept, version)


def shared_output(layer: Any, kept: KeptWeight, x: Tensor) -> Tensor | None:
    """The layer's y, where one product makes it with those of other layers on the same x."""
    forwards = _under_way.forwards
    return forwards[-1].shared.output(layer, kept, x) if forwards else None


def add(layer: Any) -> None:
    """Count a layer that has compared for itself among those of the forward that is under way."""
    if _under_way.forwards:
        layers = _under_way.forwards[-1].together.layers
        if id(layer) not in layers or layers[id(layer)]() is not layer:
            layers[id(layer)] = weakref.ref(layer)


def capturing(t: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the device of `t`."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _before(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    forwards = _under_way.forwards
    # an interrupt from the keyboard leaves one behind
    forwards[:] = [forward for forward in forwards if forward.model is not model]
    together = _known.get(model)
    if together is None:
        together = _known[model] = Together()
    from fastspec.kernels.launch import tracing  # the core loads no kernel

    plain = not tracing() and not torch._C._are_functorch_transforms_active()
    fresh: Fresh = {}
    if plain:
        with (
            torch._C.DisableTorchFunction()
        ):  # whoever looks at reads of the weights means others' reads
            fresh = together.refresh()
    forwards.append(_Forward(model, together, fresh, SharedForward(together.sharing, fresh)))


def _after(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    forwards = _under_way.forwards
    if forwards and forwards[-1].model is model:
        ended = forwards.pop()
        if output is not None and not ended.together.in_capture():  # after an error there is none
            ended.shared.end()
