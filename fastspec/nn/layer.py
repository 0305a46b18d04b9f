"""`SpectralLayer`: what every adapted layer does, whatever the layout of its stored weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastspec.config import Path, check_core
from fastspec.cores import Core, delta_shape, label
from fastspec.nn import together
from fastspec.nn.batch_rows import Layout, Rows
from fastspec.nn.batch_tasks import tasks_of_batch
from fastspec.nn.cast_copy import CastCopy, wanted_dtype
from fastspec.nn.follow import FollowsWeight
from fastspec.nn.kept import KeptCopy
from fastspec.nn.kept_weight import KeptWeight
from fastspec.nn.made_from import Seen, is_quantised, readable
from fastspec.nn.parts import kept_in_float32, merged_weight, same_values, take_over
from fastspec.ops import reference
from fastspec.ops.functional import spectral_linear, task_linear
from fastspec.ops.plan import LayerCall, Plan, make_plan, why_not
from fastspec.svd.factors import Directions, Factors

# what an adapted layer has beside the plain one's: as parameters and buffers, and when it is made
ADDED = {"delta", "base_weight", "u", "s", "vh", "_added", "_plain_class"}

ACTS_IN = "fastspec"  # a layer's entry in the metadata of a state dict


class SpectralLayer(KeptCopy, FollowsWeight):
    """What adapted layers share, whatever the layout of their stored weight.

    A subclass says by `_matrix` how its `weight` is seen as W [out, in] and by `_plain` what the
    unadapted layer computes.
    """

    bias: Any  # Tensor | None
    delta_table: Tensor
    acted: bool | None  # False: calls of the model have passed the layer by, True: have not
    read: bool  # whether something else reads its weight besides
    _cast_copy: CastCopy | None  # under autocast
    _plain_class: type[nn.Module]
    _added: set[str]
    task_bank: Any = None  # a TaskBank, which also makes `delta_table` [capacity, *delta.shape]
    row_layouts: tuple[Layout, ...] | None = None  # how rows of batches came here; None: not known

    def _plain(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def adopt(cls, plain: nn.Module, **options: Any) -> Any:
        """An adapted layer that owns the plain one's tensors, hooks and attributes (nothing is copied)."""
        layer = cls.__new__(cls)
        take_over(layer, plain)
        layer._attach(**options)
        layer._plain_class = type(plain)
        return layer

    def unload(self, merged: bool = True) -> nn.Module:
        """The plain layer again, of the class it had, with this layer's tensors, hooks and attributes.

        Args:
            merged: with W + U C Vh as its weight, else with W.

        Raises:
            ValueError: the merged weight is not finite, or the weight was changed in place while merged and
                W is asked for.
        """
        if merged:
            self.merge()
        else:
            self.unmerge()
        plain = self._plain_class.__new__(self._plain_class)
        take_over(plain, self)
        for held in (plain.__dict__, plain._parameters, plain._buffers):
            for name in self._added:
                held.pop(name, None)
        plain._non_persistent_buffers_set -= self._added
        return plain

    def _attach(
        self,
        directions: Directions,
        core: Core,
        half_width: int,
        core_rank: int,
        path: Path,
        train_bias: bool,
        factors: Factors | None,
    ) -> None:
        """Make an initialised plain layer an adapted one: factors, coefficients, what is trained."""
        check_core(core, half_width, core_rank)
        before = set(self.__dict__)
        self.directions = directions
        self.core: Core = core
        self.half_width = half_width
        self.path: Path = path
        self.forced_plan: Plan | None = None
        self.acted = None
        self.read = False
        self._cast_copy = None
        self.keep_merged(False)
        self.register_parameter("base_weight", None)
        matrix = self._matrix(self.weight)
        k = directions.rank
        # of a quantised weight the matrix may have another shape
        directions.triplets(
            min(matrix.shape) if factors is None else min(len(factors.u), factors.vh.shape[1])
        )
        self._follow(factors)
        shape = delta_shape(core, k, half_width, core_rank)
        self.delta = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=matrix.device))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(train_bias)
        self._added = (set(self.__dict__) - before) | ADDED

    @property
    def rank(self) -> int:
        return self.directions.rank

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
        rows = tasks_of_batch(self.task_bank, self, x)
        if rows is not None:
            return self._with_tasks(x, rows)
        operands = self._operands()
        if operands is None:
            return self._plain(x)
        weight, bias, u, s, vh, delta = operands
        weight, u, vh = self._cast(weight, u, vh)
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

    def _operands(self) -> tuple | None:
        """weight, bias, u, s, vh and delta; None: merged. Past `nn.Module.__getattr__`, which takes long."""
        if not torch.compiler.is_compiling():
            held, buffers = self._parameters, self._buffers
            try:
                if held["base_weight"] is not None:
                    return None
                weight: Any = held["weight"]
                if not self._made_from.unchanged(weight):
                    weight = self.follow_weight()
                return (
                    weight,
                    held["bias"],
                    buffers["u"],
                    buffers["s"],
                    buffers["vh"],
                    held["delta"],
                )
            except KeyError:  # another owner, such as a parametrisation
                pass
        if self.merged:
            return None
        return self.follow_weight(), self.bias, self.u, self.s, self.vh, self.delta

    def _with_tasks(self, x: Tensor, rows: Rows) -> Tensor:
        """Every row of the batch with its own task's core; `delta` plays no part."""
        arranged = rows.arrange(x, self)
        x, task = arranged.x, arranged.task
        weight, u, vh = self.follow_weight(), self.u, self.vh
        weight, u, vh = self._cast(weight, u, vh)
        w = self._matrix(weight)
        if self.path == "reference":
            y = reference.task_linear(x, w, self.bias, u, vh, self.delta_table, task, self.core)
            return arranged.back(y)
        y = task_linear(
            x,
            w,
            self.bias,
            u,
            self.s,
            vh,
            self.delta_table,
            task,
            core=self.core,
            singular_basis=self.singular_basis,
        )
        return arranged.back(y)

    def _cast(self, weight: Tensor, u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three in autocast's dtype where that is wanted, cast once while they stay as they are."""
        dtype = wanted_dtype(weight) if self.path == "fast" else None
        if dtype is None:
            return weight, u, vh
        copy = self._cast_copy
        if copy is None or not copy.serves(weight, u, vh, dtype):
            copy = self._cast_copy = CastCopy(weight, u, vh, dtype)
        return copy.weight, copy.u, copy.vh

    def effective_weight(self) -> Tensor:
        """W + U C Vh in the stored layout and dtype, computed in float32 at least.

        Raises:
            ValueError: the result is not finite.
        """
        return _finite(self._merged_weight())

    def _merged_weight(self) -> Tensor:
        base = self._matrix(self.follow_weight().detach())
        adapter = (self.factors, self.delta.detach(), self.core)
        return self._matrix(merged_weight(base, adapter))

    @torch.inference_mode(False)  # what is made here may be trained elsewhere
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
        self.base_weight, self.weight = self.weight, merged
        self._merged_seen = Seen(merged)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._kept = self._cast_copy = None
        tables = [
            name
            for name, table in self._buffers.items()
            if name.startswith("delta_") and table is not None
        ]
        with self._moved(), kept_in_float32(self, ["delta", *tables]):
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.check_merged()
        if not readable(self._base):  # a shard, whose writes aren't counted: it may be loaded into
            self._made_from.forget()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        base = destination.pop(prefix + "base_weight", None)
        if base is not None:
            destination[prefix + "weight"] = base
        if (told := getattr(destination, "_metadata", {}).get(prefix[:-1])) is not None:
            told[ACTS_IN] = self._acts_in()

    def _acts_in(self) -> dict[str, Any]:
        """What says, beside the base weight and `delta`, which update that is: a state dict's metadata."""
        d = self.directions
        start, stop = d.triplets(min(self.u.shape[0], self.vh.shape[1]))
        told = {"core": self.core, "basis": d.basis, "triplets": [start, stop]}
        return told | ({"seed": d.seed} if d.basis == "random" else {})

    def _why_not_load(self, given: Tensor) -> str | None:
        """What speaks against the weight that a state dict holds."""
        if not is_quantised(given):
            return None
        return (
            f"it is quantised in the state dict ({type(given.data).__name__}) and not here: call "
            "quantize_base() on this model first, or load a state dict of the float model"
        )

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
        given = state_dict.get(prefix + "weight")
        if given is not None and (why := self._why_not_load(given)):
            error_msgs.append(f"{prefix}weight: {why}")
            return
        there, here = local_metadata.get(ACTS_IN), self._acts_in()
        if prefix + "delta" in state_dict and there not in (None, here):
            error_msgs.append(
                f"{prefix}delta: the coefficients of the state dict mean another update than they would "
                f"here: they are of {there}, and this layer is of {here}: spectralize the model alike"
            )
            return
        if given is None:
            self.unmerge()
        self._drop_merged()
        unchanged = self._made_from.unchanged(self.weight)
        same = readable(self.weight) and (given is None or same_values(given, self.weight))
        # a parametrisation of torch's has keys of its own
        plain = (
            given is not None and prefix + "delta" not in state_dict and "delta" in self._parameters
        )
        self._made_from.forget()
        self._cast_copy = None
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
        made = self._made_from
        if not readable(self.weight):
            made.forget()
        elif same and unchanged:
            made.look(self.weight)
        elif given is not None and not made.same_content(self.weight):
            self.refactorize()

    def extra_repr(self) -> str:
        out_features, in_features = self.u.shape[0], self.vh.shape[1]
        parts = [
            f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}",
            f"rank={self.rank}, core={label(self.core, self.delta)}, basis={self.directions.basis}",
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
