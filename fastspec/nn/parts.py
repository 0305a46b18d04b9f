"""What the layers of this package and those of `fastspec.peft` are made of.

Frozen factors that know whether they are a singular basis still, coefficients that stay float32, and the
merged weight.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.cores import Core, core_matrix
from fastspec.ops import low_rank
from fastspec.precision import full_precision
from fastspec.svd.factors import Factors


def calls_running(module: nn.Module | None) -> int:
    """How many calls of a module this thread is in."""
    count, frame = 0, sys._getframe()
    call = nn.Module._call_impl.__code__
    while frame is not None:
        count += frame.f_code is call and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return count


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the tensors, hooks and attributes of `old`, in whose place it comes.

    The very dictionaries of hooks go along: a hook's handle refers to them, and still removes it.
    """
    new.__dict__.update(old.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        new.__dict__[name] = copy.copy(old.__dict__[name])  # what `new` adds is not old's
    wrapped: Iterable[Any] = new._load_state_dict_pre_hooks.values()
    for hook in wrapped:
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(new)


class FrozenFactors(nn.Module):
    """The factors of one weight as buffers outside the state dict: they are made from the weight."""

    u: Tensor  # [out, k]
    s: Tensor  # [k], float32 at least
    vh: Tensor  # [k, in]
    _singular_dtype: torch.dtype | None  # in which they were made as a singular basis, until a cast

    def _hold(self, factors: Factors) -> None:
        """Take these factors, in place of former ones if any.

        Raises:
            ValueError: the former ones were made parameters, to be sharded along with the weight.
        """
        if "u" in self._parameters:
            raise ValueError(
                "the factors of a layer are sharded along with its weight, which has changed: load the "
                "weights before shard_factors(model), which must come after spectralize"
            )
        self.register_buffer("u", factors.u, persistent=False)
        self.register_buffer("s", factors.s, persistent=False)
        self.register_buffer("vh", factors.vh, persistent=False)
        self._singular_dtype = factors.u.dtype if factors.singular else None

    @property
    def singular_basis(self) -> bool:
        """Whether `W V = U S` still holds to rounding."""
        return self._singular_dtype in (torch.float32, torch.float64)

    @property
    def factors(self) -> Factors:
        return Factors(self.u, self.s, self.vh, self.singular_basis)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        s = self.s
        super()._apply(fn, recurse)
        if self.s.dtype.itemsize < 4:
            self.s = s.to(self.s.device)
        if self.u.dtype != self._singular_dtype:
            # a cast rounds the factors: W V = U S then no longer holds to rounding (design F3)
            self._singular_dtype = None
        return self


@contextlib.contextmanager
def kept_in_float32(owner: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Around a cast of `owner`: its tensors of these names keep their float32 values (design section 1).

    Parameters keep their gradients too; all of them move to another device as the cast asks. What a
    parametrisation of torch's owns is left to it.
    """
    owned = _owned(owner)
    before = {name: owned[name] for name in names if name in owned}
    values = {
        name: (t.data, None if t.grad is None else t.grad.data)
        for name, t in before.items()
        if isinstance(t, nn.Parameter)
    }
    yield
    owned = _owned(owner)
    for name, former in before.items():
        now = owned[name]
        if now.dtype == torch.float32:
            continue
        if name not in values:
            owner._buffers[name] = former.to(now.device)
            continue
        data, grad = values[name]
        now.data = data.to(now.device)
        if grad is not None:
            now.grad = grad.to(now.device)


def _owned(owner: nn.Module) -> dict[str, Tensor]:
    held = (*owner._buffers.items(), *owner._parameters.items())
    return {name: t for name, t in held if t is not None}


@torch.no_grad()
def merged_weight(w: Tensor, *adapters: tuple[Factors, Tensor, Core]) -> Tensor:
    """W + sum_a U_a C_a Vh_a  [out, in], summed in float32 at least and rounded once.

    Args:
        w: [out, in], possibly a transposed view; the result has its dtype and its order in memory.
        adapters: the factors, the storage `delta` of the core, and the kind of core, of each.
    """
    wide = torch.promote_types(w.dtype, torch.float32)
    total = w.to(wide)
    for adapter in adapters:
        left, right = update_factors(*adapter, wide)
        with full_precision(w.device.type):
            total = torch.addmm(total, left, right)
    return torch.empty_like(w).copy_(total)


def update_factors(
    f: Factors, delta: Tensor, core: Core, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """L [out, r] and R [r, in] with U C Vh = L R, where r is k or a low-rank core's rank.

    Args:
        f: the factors of rank k.
        delta: storage of the core.
        core: its kind.
        dtype: that of the result, float32 or float64.
    """
    u, vh = f.u.to(dtype), f.vh.to(dtype)
    with full_precision(u.device.type):
        if core == "low_rank":
            return low_rank.update_factors(u, vh, delta)
        return u @ core_matrix(delta.to(dtype), core), vh


def same_values(given: Tensor, weight: Tensor) -> bool:
    """Whether a state dict's `given` tensor says what `weight`, which factors were made from, holds."""
    return (
        weight.device.type != "meta"
        and given.shape == weight.shape
        and torch.equal(given.to(weight), weight)
    )
