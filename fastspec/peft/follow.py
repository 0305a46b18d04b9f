"""`FollowsBase`: bases that are those of the base layer's weight as it is, whoever changes it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.fingerprint import tensor_fingerprint
from fastspec.nn.made_from import MadeFrom, Seen, came_along, readable
from fastspec.nn.parts import same_values
from fastspec.peft.state import BaseWeights, FrozenBasis


class FollowsBase(nn.Module):
    """The part of the layer that knows what its bases were made from, and notices changes of it."""

    fastspec_basis: nn.ModuleDict
    fastspec_delta: nn.ParameterDict
    fastspec_origin: dict[str, tuple[BaseWeights, str]]
    base_weight: Any  # the unmerged weight
    merged: bool
    get_base_layer: Any

    def __init__(self) -> None:
        super().__init__()
        self._made_from, self._merged_seen = MadeFrom(), Seen()

    def base_matrix(self) -> Tensor:
        raise NotImplementedError

    def follow(self, adapter: str, origin: BaseWeights, name: str) -> None:
        """Note what the adapter's basis was made from, which is told when this layer's weight changes."""
        self.fastspec_origin[adapter] = origin, name
        self._made_from = MadeFrom(self.base_weight, origin.fingerprints[name])

    def _follow_weight(self) -> None:
        """Make the bases again if the unmerged weight is no longer what they were made from."""
        if torch.compiler.is_compiling():
            return
        made, kept = self._made_from, self._buffers["fastspec_base_weight"]
        if kept is None:  # past `nn.Module.__getattr__`, which takes long
            kept = self._modules["base_layer"]._parameters.get("weight")  # type: ignore[union-attr]
        if kept is not None and made.unchanged(kept):
            return
        weight = self.base_weight
        if made.unchanged(weight):
            return
        # a weight that is trained runs the plain formula, which is right with any U and Vh
        if weight.requires_grad or not readable(weight) or made.same_content(weight):
            return
        now = MadeFrom(weight)
        assert now.fingerprint is not None
        if any(bool(delta.detach().any()) for delta in self.fastspec_delta.values()):
            names = sorted({name for _, name in self.fastspec_origin.values()})
            warnings.warn(
                f"{', '.join(names)}: the base weight has changed since the basis was made: it is made "
                "again, and the coefficients, which are not zero, act in another basis from here on; load "
                "the adapter again, or zero its coefficients",
                stacklevel=2,
            )
        remade: dict[int, FrozenBasis] = {}
        for adapter, basis in self.fastspec_basis.items():
            assert isinstance(basis, FrozenBasis)
            if basis.fingerprint != now.fingerprint:
                if id(basis) not in remade:
                    # a new one: layers that shared the weight may have the former still
                    remade[id(basis)] = basis.made_again(self.base_matrix(), now.fingerprint)
                self.fastspec_basis[adapter] = remade[id(basis)]
            origin, name = self.fastspec_origin[adapter]
            origin.changed(name, now.fingerprint)
        self._made_from = now

    def knows(self, given: Tensor) -> bool:
        """Whether these are the weights that the bases were made from."""
        if same_values(given, self.base_weight):
            return True
        return tensor_fingerprint(given.to(self.base_weight)) == self._made_from.fingerprint

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        bases: list[Any] = list(self.fastspec_basis.values())
        if bases:
            self._follow_weight()
        dtype, s = self.base_weight.dtype, [basis.s for basis in bases]
        merged_seen = self.merged and self._merged_seen.unchanged(self.get_base_layer().weight)
        super()._apply(fn, recurse)
        weight = self.base_weight
        if merged_seen:
            self._merged_seen = Seen(self.get_base_layer().weight)
        if not came_along(s, [basis.s for basis in bases]):
            for basis in bases:
                basis.fingerprint = ""  # of nothing: `to_empty` brings no values along
            self._made_from = MadeFrom()
        elif readable(weight):
            if weight.dtype == dtype:
                self._made_from.look(weight)
            else:  # of the weight that came out of the cast
                self._made_from = MadeFrom(weight)
        return self
