"""`SpectralLayer`: what every adapted layer does, whatever the layout of its stored weight."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.config import Path
from fastspec.cores import Core, delta_shape
from fastspec.nn import together
from fastspec.nn.batch_tasks import tasks_of_batch
from fastspec.nn.kept_weight import KeptWeight, kept_weight
from fastspec.nn.parts import FrozenFactors, kept_in_float32, merged_weight, same_values
from fastspec.ops import reference
from fastspec.ops.functional import spectral_linear, task_linear
from fastspec.ops.plan import LayerCall, Plan, make_plan, why_not
from fastspec.svd.factors import Directions, Factors, factorize


class SpectralLayer(FrozenFactors):
    """What adapted layers share, whatever the layout of their stored weight.

    A subclass says by `_matrix` how its `weight` is seen as W [out, in] and by `_plain` what the
    unadapted layer computes.
    """

    weight: Any  # Tensor
    bias: Any  # Tensor | None
    delta: Tensor
    delta_table: Tensor
    base_weight: Tensor | None
    # W + U C Vh and the coefficients it is for; in 16 bits or on a device, whoever compares them there
    _kept: tuple[Tensor, Tensor] | KeptWeight | None
    task_bank: Any = None  # a TaskBank, which also makes `delta_table` [capacity, *delta.shape]

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        """The stored weight as a view [out, in]."""
        raise NotImplementedError

    def _plain(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def adopt(cls, plain: nn.Module, **options: Any) -> Any:
        """An adapted layer that owns the plain one's tensors, hooks and attributes (nothing is copied)."""
        layer = cls.__new__(cls)
        layer.__dict__.update({k: copy.copy(v) for k, v in plain.__dict__.items()})
        layer._attach(**options)
        return layer

    def _attach(
        self,
        directions: Directions,
        core: Core,
        half_width: int,
        path: Path,
        train_bias: bool,
        factors: Factors | None,
    ) -> None:
        """Make an initialised plain layer an adapted one: factors, coefficients, what is trained."""
        self.directions = directions
        self.core: Core = core
        self.half_width = half_width
        self.path: Path = path
        self.forced_plan: Plan | None = None
        self.keep_merged(False)
        matrix = self._matrix(self.weight)
        k = directions.rank
        directions.triplets(min(matrix.shape))
        if factors is None and matrix.device.type == "meta":
            factors = Factors.empty(matrix, k)  # made when the weight is loaded
        if factors is None:
            factors = factorize([matrix], [directions], ["weight"])[0]
        self._hold(factors)
        shape = delta_shape(core, k, half_width)
        self.delta = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=matrix.device))
        self.register_parameter("base_weight", None)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(train_bias)

    @property
    def rank(self) -> int:
        return self.directions.rank

    @property
    def merged(self) -> bool:
        """Whether `weight` holds W + U C Vh at the moment (see `merge`)."""
        return self.base_weight is not None

    def refactorize(self) -> None:
        """Make the factors again from the weight as it is now. The coefficients stay as they are."""
        if self.merged:
            self.unmerge()
        self._kept = None
        self._hold(factorize([self._matrix(self.weight)], [self.directions], ["weight"])[0])

    def plan(self, n: int, *, needs_dx: bool = True) -> Plan:
        """The plan of a training step over `n` rows (tokens); `needs_dx=False` for a first layer."""
        return self.forced_plan or make_plan(self._call(n, needs_dx))

    def _call(self, n: int, needs_dx: bool = True) -> LayerCall:
        out_features, in_features = self._matrix(self.weight).shape
        return LayerCall(
            n,
            in_features,
            out_features,
            self.rank,
            core=self.core,
            dtype=self.weight.dtype,
            device=self.weight.device.type,
            needs_dx=needs_dx,
            needs_delta=self.delta.requires_grad,
            singular_basis=self.singular_basis,
        )

    def forward(self, x: Tensor) -> Tensor:
        task = tasks_of_batch(self.task_bank)
        if task is not None:
            return self._with_tasks(x, task)
        if self.merged:
            return self._plain(x)
        weight, bias, u, s, vh, delta = self._operands()
        w = self._matrix(weight)
        if self.path == "reference":
            return reference.spectral_linear(x, w, bias, u, vh, delta, self.core)
        effective = self._kept_weight() if self.keeps_merged else None
        kept = self._kept
        if effective is not None and isinstance(kept, KeptWeight):
            y = together.shared_output(self, kept, x)
            if y is not None:
                return y
            bias, u, vh = kept.beside(bias, u, vh)
        return spectral_linear(
            x,
            w,
            bias,
            u,
            s,
            vh,
            delta,
            core=self.core,
            singular_basis=self.singular_basis,
            plan=self.forced_plan,
            effective=effective,
        )

    def _operands(self) -> tuple:
        """weight, bias, u, s, vh and delta, past `nn.Module.__getattr__`, which takes the host long."""
        if not torch.compiler.is_compiling():
            held, buffers = self._parameters, self._buffers
            try:
                return (
                    held["weight"],
                    held["bias"],
                    buffers["u"],
                    buffers["s"],
                    buffers["vh"],
                    held["delta"],
                )
            except KeyError:  # another owner, such as a parametrisation
                pass
        return self.weight, self.bias, self.u, self.s, self.vh, self.delta

    def keep_merged(self, keep: bool = True) -> None:
        """Keep one copy of W + U C Vh between calls, made again only when the coefficients changed.

        It saves both merges of a step: for evaluation, and for training where many batches pass between
        two optimiser steps. It costs the memory of one more weight. In 16 bits and on a GPU it replaces the
        two thin products that a layer adds: a wide layer's step then costs little more than the frozen
        one's. In 16 bits each entry of the copy is rounded up or down by a threshold of its own
        (`fastspec.ops.kept`). A CUDA graph holds the comparison, so that its replays see new coefficients.

        It has no effect under autocast, while compiling, with a forced plan, and, in 16 bits or on a GPU,
        with a band core. In float32 on a GPU every call makes the copy.
        """
        self.keeps_merged = keep
        self._kept = None

    def _kept_weight(self) -> Tensor | None:
        """W + U C Vh as a view [out, in], refreshed where needed; None where it is not to be used."""
        weight, delta = self.weight, self.delta.detach()
        if (
            torch.compiler.is_compiling()
            or self.forced_plan is not None
            or torch.is_autocast_enabled(weight.device.type)
        ):
            return None
        if weight.device.type != "cpu" or weight.dtype.itemsize < 4:
            on_device = kept_weight(self)
            return None if on_device is None else on_device.effective
        if not delta.any():
            return self._matrix(weight)  # bit for bit the pretrained layer, without a copy
        kept = self._kept
        if not isinstance(kept, tuple) or not torch.equal(kept[1], delta):
            # a new tensor: a graph may still hold the old one for its backward
            with torch.inference_mode(False):  # kept beyond it, for training too
                self._kept = kept = (self._merged_weight(), delta.clone())
        return self._matrix(kept[0])

    def _with_tasks(self, x: Tensor, task: Tensor) -> Tensor:
        """Every row of the batch x [B, ..., in] with its own task's core; `delta` plays no part."""
        w = self._matrix(self.weight if self.base_weight is None else self.base_weight)
        if self.path == "reference":
            return reference.task_linear(
                x, w, self.bias, self.u, self.vh, self.delta_table, task, self.core
            )
        return task_linear(
            x,
            w,
            self.bias,
            self.u,
            self.s,
            self.vh,
            self.delta_table,
            task,
            core=self.core,
            singular_basis=self.singular_basis,
        )

    def effective_weight(self) -> Tensor:
        """W + U C Vh in the stored layout and dtype, computed in float32 at least.

        Raises:
            ValueError: the result is not finite.
        """
        return _finite(self._merged_weight())

    def _merged_weight(self) -> Tensor:
        base = self.weight if self.base_weight is None else self.base_weight
        adapter = (self.factors, self.delta.detach(), self.core)
        return self._matrix(merged_weight(self._matrix(base.detach()), adapter))

    @torch.no_grad()
    def merge(self, effective: Tensor | None = None) -> None:
        """Let `weight` hold W + U C Vh, so that a call costs what the plain layer costs.

        The base weight is kept in `base_weight`, so that `unmerge` is exact; while merged, changes of
        `delta` have no effect and nothing is trained. A state dict always holds the base weight.

        Args:
            effective: W + U C Vh in the stored layout, where it has been computed already.

        Raises:
            ValueError: the merged weight is not finite; the layer stays unmerged.
        """
        if self.merged:
            return
        effective = self._merged_weight() if effective is None else effective
        merged = nn.Parameter(_finite(effective), requires_grad=False)
        self.base_weight, self.weight = self.weight, merged  # type: ignore[assignment]

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if self.merged:
            self.weight, self.base_weight = self.base_weight, None  # type: ignore[assignment]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._kept = None
        tables = [
            name
            for name, table in self._buffers.items()
            if name.startswith("delta_") and table is not None
        ]
        with kept_in_float32(self, ["delta", *tables]):
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        base = destination.pop(prefix + "base_weight", None)
        if base is not None:
            destination[prefix + "weight"] = base

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.unmerge()
        given = state_dict.get(prefix + "weight")
        same = given is None or same_values(given, self.weight)
        plain = given is not None and prefix + "delta" not in state_dict
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if plain:
            # a plain layer's state is the pretrained layer: no shift
            missing_keys.remove(prefix + "delta")
            if self.delta.device.type == "meta":
                zeros = torch.zeros(self.delta.shape, device=self.weight.device)
                self.delta = nn.Parameter(zeros, requires_grad=self.delta.requires_grad)
            with torch.no_grad():
                self.delta.zero_()
        if not same and self.weight.device.type != "meta":
            self.refactorize()

    def extra_repr(self) -> str:
        out_features, in_features = self.u.shape[0], self.vh.shape[1]
        core = f"band({self.half_width})" if self.core == "band" else self.core
        parts = [
            f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}",
            f"rank={self.rank}, core={core}, basis={self.directions.basis}",
        ]
        if self.directions.select != "leading":
            parts.append(f"select={self.directions.select}")
        dtype = str(self.weight.dtype).removeprefix("torch.")
        parts.append(f"dtype={dtype}")
        if self.merged:
            parts.append("merged")
        elif self.path == "reference":
            parts.append("path=reference")
        else:
            parts.append(f"plan={self.plan(2048)} at 2048 rows")
            if self.forced_plan and (reason := why_not(self.forced_plan, self._call(2048))):
                parts.append(f"refused: {reason}")
        return ", ".join(parts)


def _finite(effective: Tensor) -> Tensor:
    if not bool(torch.isfinite(effective).all()):
        raise ValueError(
            "the merged weight is not finite: the coefficients (`delta`) hold NaN, infinity or "
            "values beyond the range of the weight"
        )
    return effective
