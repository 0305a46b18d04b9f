"""`KeptWeight`: a layer's copy of W + U C Vh where nobody may look at values, which would make a device wait.

`fastspec.nn.together` makes those of a whole model again at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastspec.nn import together
from fastspec.nn.shared_input import version
from fastspec.ops.kept import CORES, Operands, Room, keep_merged


class KeptWeight:
    """A copy, what it was made from, and the coefficients that it was made for.

    Copies and pickles of a layer have none: they make their own.
    """

    before: KeptWeight | None

    def __init__(
        self, layer: Any, before: KeptWeight | None = None, room: Room | None = None
    ) -> None:
        weight, self.bias, self.u, self.vh, self.delta = _of(layer)
        with torch.no_grad(), torch.inference_mode(False):  # kept beyond it, for training too
            matrix = layer._matrix(weight.detach())
            self.room = room or Room.like(matrix, self.bias, self.u, self.vh)
            self.made_for = torch.full_like(self.delta.detach(), float("nan"))  # for none yet
        self.factor_versions = version(self.u), version(self.vh)
        self.version = -1  # of delta, as the copy was last compared
        self.captured = False
        while before is not None and not before.captured:
            before = before.before
        self.before = before  # a CUDA graph that was captured with it goes on writing there

    def moved(self, layer: Any, room: Room) -> KeptWeight:
        """A copy for the same layer in other memory, to be made there."""
        return KeptWeight(layer, self, room)

    @property
    def effective(self) -> Tensor:
        """W + U C Vh [out, in]."""
        return self.room.effective

    def beside(
        self, bias: Tensor | None, u: Tensor, vh: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """bias, u and vh as they lie in the copy's storage, where they do; else as they are given."""
        room = self.room
        if room.u is None or room.vh is None:
            return bias, u, vh
        return room.bias, room.u, room.vh

    def serves(self, layer: Any) -> bool:
        """Whether it is of this layer as it is: its coefficients may have other values, but nothing else.

        A graph that holds the copy for its backward holds the coefficients too, and finds them changed. Those
        of another tensor get another copy.
        """
        _, bias, u, vh, delta = _of(layer)
        same = self.delta is delta and self.u is u and self.vh is vh and self.bias is bias
        trained = self.room.bias is not None and bias is not None and bias.requires_grad
        return same and not trained and self.factor_versions == (version(u), version(vh))

    def operands(self, layer: Any) -> Operands:
        """Those of `fastspec.ops.kept.keep_merged` but one."""
        room, weight = self.room, layer._matrix(_of(layer)[0].detach())
        rest = weight, self.u, self.vh, self.delta.detach(), layer.core
        return (
            room.effective,
            self.made_for,
            *rest,
            None if room.bias is None else self.bias,
            room.bias,
        )

    def addresses(self, layer: Any) -> tuple[int, ...]:
        """Where the operands lie now."""
        found = (_of(layer)[0], self.u, self.vh, self.delta, self.bias)
        return id(self), *(0 if t is None else t.data_ptr() for t in found)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()


def kept_weight(layer: Any) -> KeptWeight | None:
    """The layer's copy, compared with the coefficients where they lie; None where there is none."""
    if layer.core not in CORES:
        return None
    kept = layer._kept if isinstance(layer._kept, KeptWeight) else None
    now = version(layer.delta)
    if kept is not None and together.trusts(layer, kept, now):
        return kept  # type: ignore[no-any-return]
    if kept is None or not kept.serves(layer):
        kept = layer._kept = KeptWeight(layer, kept)
    changed, kept.version = kept.version != now, now
    kept.captured = kept.captured or together.capturing(kept.made_for)
    *operands, bias, bias_out = kept.operands(layer)
    keep_merged(*operands, changed, bias, bias_out)
    together.add(layer)
    return kept  # type: ignore[no-any-return]


def _of(layer: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    held, buffers = layer._parameters, layer._buffers  # past `nn.Module.__getattr__`, which is slow
    try:
        return held["weight"], held["bias"], buffers["u"], buffers["vh"], held["delta"]
    except KeyError:  # another owner, such as a parametrisation
        return layer.weight, layer.bias, layer.u, layer.vh, layer.delta
