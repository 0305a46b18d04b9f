"""What factors were made from, and notice of a weight that has changed since."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastspec.fingerprint import tensor_fingerprint


class Seen:
    """A tensor as it was when last looked at; `unchanged` looks at no values and makes no device wait.

    An operation in place counts in the tensor's version; another tensor or storage in its place is another
    object. The weak references keep no memory alive, but for their addresses, which are so never given to
    others. Copies and pickles have seen nothing. What is not counted: writes through `.data`, and writes to
    tensors made under `torch.inference_mode`.
    """

    __slots__ = ("_storage", "_tensor", "_version")

    def __init__(self, tensor: Tensor | None = None) -> None:
        self._tensor: Callable[[], Tensor | None] = _nothing
        self._storage: Any = None
        self._version: int | None = None
        if tensor is not None:
            self.look(tensor)

    def look(self, tensor: Tensor) -> None:
        """Take the tensor as it is now."""
        self._tensor = weakref.ref(tensor)
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._version = None if tensor.is_inference() else tensor._version

    def forget(self) -> None:
        """Take nothing for seen: the next comparison is of values."""
        self._tensor = _nothing

    def unchanged(self, tensor: Tensor) -> bool:
        if tensor is not self._tensor() or tensor.untyped_storage()._cdata != self._storage.cdata:
            return False
        if self._version is None:
            return tensor.is_inference()
        return tensor._version == self._version

    def written(self, tensor: Tensor) -> bool:
        """Whether this very tensor was looked at, and has other values in it since."""
        return tensor is self._tensor() and not self.unchanged(tensor)

    def __reduce__(self) -> tuple:
        return type(self), ()


class MadeFrom(Seen):
    """The weight that factors were made from, known by its fingerprint; without one, none yet.

    `original` differs from `fingerprint` where the weight was cast afterwards, and the factors with it.
    """

    __slots__ = ("fingerprint", "original")

    def __init__(
        self,
        weight: Tensor | None = None,
        fingerprint: str | None = None,  # of the weight, where it is known
        original: str | None = None,
    ) -> None:
        super().__init__(weight)
        if fingerprint is None and weight is not None:
            fingerprint = tensor_fingerprint(weight)
        self.fingerprint = fingerprint
        self.original = original or fingerprint

    def same_content(self, weight: Tensor) -> bool:
        """Compare values, which reads them all; where they are the same the weight counts as seen."""
        if self.fingerprint is None or tensor_fingerprint(weight) != self.fingerprint:
            return False
        self.look(weight)
        return True

    def __reduce__(self) -> tuple:
        return type(self), (None, self.fingerprint, self.original)


def readable(weight: Tensor) -> bool:
    """Whether a weight has values here to be compared: no shard, placeholder, fake or traced tensor."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.device.type != "meta"
        and not torch._C._are_functorch_transforms_active()
    )


def came_along(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether a module's `_apply` brought its values along, by these; `to_empty` does not."""
    return all(
        "meta" not in (was.device.type, now.device.type) and torch.equal(was.to(now), now)
        for was, now in zip(before, after, strict=True)
        if was is not now
    )


def _nothing() -> None:
    return None
