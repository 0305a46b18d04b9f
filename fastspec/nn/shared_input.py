"""Layers that are called on the same x one after another, such as query, key and value: one product for all.

Which layers these are is seen in a forward. Their kept copies then move into one matrix
(csrc/cuda_shared_input.cpp), and in the forwards that follow the first of them computes every output. Each of
the others is called as ever, with all its hooks, and takes its own output if it is asked for just that: by
the same tensor, which nobody has written to, with the copy and the coefficients that it was made with. Else
it computes for itself.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastspec.kernels import MAX_RANK
from fastspec.ops.kept import Room, padded

if TYPE_CHECKING:
    from fastspec.nn.kept_weight import KeptWeight

Fresh = dict[
    int, tuple[Any, int]
]  # by a layer's id: its copy, and the version that it is right for


class Input:
    """A layer's x as it was: known by the object and its version, and not kept alive."""

    def __init__(self, x: Tensor) -> None:
        self.ref, self.version = weakref.ref(x), version(x)
        self.grad_mode = torch.is_grad_enabled()

    def is_(self, x: Tensor) -> bool:
        if x is not self.ref() or x.is_inference():
            return False
        return x._version == self.version and torch.is_grad_enabled() == self.grad_mode


@dataclasses.dataclass
class Output:
    """What the first layer of a group computed for another one."""

    y: Tensor
    x: Input
    kept: KeptWeight
    version: int  # of the coefficients
    trained: bool  # whether they required a gradient
    group: Group

    def is_for(self, layer: Any, kept: KeptWeight, x: Tensor) -> bool:
        same = kept is self.kept and kept.version == self.version
        return same and layer.delta.requires_grad == self.trained and self.x.is_(x)


class Group:
    """Layers whose copies lie in one matrix."""

    def __init__(self, layers: Sequence[Any]) -> None:
        """Move the copies of these layers into one matrix; they are made anew there."""
        weights = [layer._matrix(layer.weight.detach()) for layer in layers]
        self.columns: int = weights[0].shape[1]
        self.outs = [len(weight) for weight in weights]
        self.ranks = [padded(layer.rank) for layer in layers]
        rows, width = sum(self.outs) + sum(self.ranks), self.columns + sum(self.ranks)
        with torch.no_grad(), torch.inference_mode(False):
            self.matrix = weights[0].new_zeros(rows, padded(width, 16))[:, :width]
            biased = any(layer.bias is not None for layer in layers)
            self.bias = weights[0].new_zeros(rows) if biased else None
            rooms = [self._room(at, layer) for at, layer in enumerate(layers)]
        self.kept = [
            layer._kept.moved(layer, room) for layer, room in zip(layers, rooms, strict=True)
        ]
        self.members = [weakref.ref(layer) for layer in layers]
        for layer, kept in zip(layers, self.kept, strict=True):
            layer._kept = kept

    def _room(self, at: int, layer: Any) -> Room:
        row, below = sum(self.outs[:at]), sum(self.outs) + sum(self.ranks[:at])
        beside, k = self.columns + sum(self.ranks[:at]), layer.rank
        rows = self.matrix[row : row + self.outs[at]]
        u, vh = rows[:, beside : beside + k], self.matrix[below : below + k, : self.columns]
        bias = None
        if self.bias is not None and layer.bias is not None:
            bias = self.bias[row : row + self.outs[at]]
        return Room(rows[:, : self.columns], u.copy_(layer.u), vh.copy_(layer.vh), bias)

    def layers(self, fresh: Fresh) -> list[Any] | None:
        """The layers, if the copies of all are still here and right for their coefficients."""
        found = [ref() for ref in self.members]
        for at, (layer, kept) in enumerate(zip(found, self.kept, strict=True)):
            if layer is None or layer._kept is not kept or not kept.serves(layer):
                return None
            right = (kept, version(layer.delta))
            # the first one has just been asked for its own
            if layer.merged or not (at == 0 or fresh.get(id(layer)) == right):
                return None
        return found

    def takes(self, x: Tensor) -> bool:
        """Whether x is one that the product takes as the layers would, and whose changes are seen."""
        return (
            type(x) is Tensor
            and not x.is_inference()
            and x.dtype == self.matrix.dtype
            and x.device == self.matrix.device
            and x.dim() > 0
            and x.shape[-1] == self.columns
            and x.numel() > 0
            and not torch._C._are_functorch_transforms_active()
            and not _saving_is_watched()
        )


class Sharing:
    """The groups of a model."""

    def __init__(self) -> None:
        self.groups: dict[int, Group] = {}  # by the id of their first layer
        self.captured: list[Group] = []  # dissolved, but CUDA graphs go on reading them
        self.refused: weakref.WeakSet[Any] = (
            weakref.WeakSet()
        )  # first layers whose others weren't called

    def learn(self, runs: Sequence[Run]) -> None:
        """Form groups of layers that were called on the same x."""
        for run in runs:
            layers = [layer for ref in run.layers if (layer := ref()) is not None and _joins(layer)]
            if (
                len(layers) < 2
                or len(set(map(id, layers))) < len(layers)
                or layers[0] in self.refused
            ):
                continue
            if sum(padded(layer.rank) for layer in layers) <= MAX_RANK:
                self.groups[id(layers[0])] = Group(layers)

    def dissolve(self, group: Group) -> None:
        """Let each layer of a group have a copy of its own again."""
        if any(kept.captured for kept in group.kept):
            self.captured.append(group)
        for key in [key for key, other in self.groups.items() if other is group]:
            del self.groups[key]
        for ref, kept in zip(group.members, group.kept, strict=True):
            layer = ref()
            if layer is not None and layer._kept is kept:
                layer._kept = None


@dataclasses.dataclass
class Run:
    """Layers that were called on the same x, one after another."""

    x: Input
    layers: list[weakref.ref[Any]]


class SharedForward:
    """What is shared in one forward."""

    def __init__(self, sharing: Sharing, fresh: Fresh) -> None:
        self.sharing, self.fresh = sharing, fresh
        self.runs: list[Run] = []
        self.outputs: dict[int, Output] = {}  # by the id of the layer that they are for
        self.in_vain: list[
            Output
        ] = []  # computed for a layer that was then asked for something else

    def output(self, layer: Any, kept: KeptWeight, x: Tensor) -> Tensor | None:
        """The layer's y, where it is computed with others'; None: it computes for itself."""
        ready = self.outputs.pop(id(layer), None)
        if ready is not None:
            if ready.is_for(layer, kept, x):
                return ready.y
            self.in_vain.append(ready)
        group = self.sharing.groups.get(id(layer))
        if group is None:
            self._note(layer, x)
            return None
        layers = group.layers(self.fresh)
        if layers is None or layers[0] is not layer:
            self.sharing.dissolve(group)
            return None
        if not group.takes(x):
            return None
        deltas = [one.delta for one in layers]
        shared_input = torch.ops.fastspec.shared_input
        ys = shared_input(x, group.matrix, group.bias, group.outs, group.ranks, deltas)
        seen = Input(x)
        for one, y, copy in zip(layers[1:], ys[1:], group.kept[1:], strict=True):
            trained = one.delta.requires_grad
            self.outputs[id(one)] = Output(y, seen, copy, version(one.delta), trained, group)
        return ys[0]  # type: ignore[no-any-return]

    def _note(self, layer: Any, x: Tensor) -> None:
        if _saving_is_watched():
            return
        if self.runs and self.runs[-1].x.is_(x):
            self.runs[-1].layers.append(weakref.ref(layer))
        else:
            self.runs.append(Run(Input(x), [weakref.ref(layer)]))

    def end(self) -> None:
        """Learn from a forward that has come to its end."""
        for output in (*self.in_vain, *self.outputs.values()):
            first = output.group.members[0]()
            if first is not None:
                self.sharing.refused.add(first)
            self.sharing.dissolve(output.group)
        self.sharing.learn(self.runs)


def version(t: Tensor) -> int:
    """How often the tensor was written to, as far as PyTorch counts."""
    return -2 if t.is_inference() else t._version


def _saving_is_watched() -> bool:
    """Whether hooks see what autograd saves.

    A checkpoint's do: it must save the same when it computes again, where each layer computes for itself. An
    old PyTorch does not tell.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def _joins(layer: Any) -> bool:
    """Whether the layer's copy lies beside its factors, and its rows of the product are worth it."""
    kept = layer._kept
    room = getattr(kept, "room", None)
    if room is None or room.vh is None or layer.core != "diag" or not kept.serves(layer):
        return False
    out, columns = room.effective.shape
    return bool(out <= columns)
