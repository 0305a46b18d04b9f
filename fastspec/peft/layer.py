"""The layer PEFT puts round an `nn.Linear` or GPT-2's `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from fastspec.cores import Core, core_matrix, label, summed
from fastspec.model.passed_by import warn_passed_by
from fastspec.nn.made_from import Seen, is_quantised
from fastspec.nn.parts import merged_weight, update_factors
from fastspec.ops.functional import spectral_linear, task_linear
from fastspec.ops.plan import LayerCall, make_plan
from fastspec.peft.follow import FollowsBase
from fastspec.peft.state import BaseWeights, Coefficients, Form, FrozenBasis
from fastspec.precision import full_precision
from fastspec.svd.factors import Directions, Factors

BASE = "__base__"  # PEFT's name for "no adapter" among the `adapter_names` of a batch


class SpectralLinear(FollowsBase, BaseTunerLayer):
    """`base_layer` with y = x (W + U C Vh)^T + b, one core C an adapter, by `fastspec.spectral_linear`.

    The base layer's weight is read, its forward is not called while an adapter is active.
    """

    adapter_layer_names = ("fastspec_delta",)
    other_param_names = ("fastspec_basis", "fastspec_form", "fastspec_origin")
    cast_input_dtype_enabled = (
        True  # of `peft.helpers.disable_input_dtype_casting`: nothing is cast here
    )
    fastspec_base_weight: Tensor | None
    acted: bool | None  # False: calls of the model have passed the layer by, True: have not
    read: bool  # whether something else reads its weight besides

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.fastspec_delta = Coefficients()
        self.fastspec_basis = nn.ModuleDict()
        self.fastspec_form: dict[str, Form] = {}
        self.fastspec_origin: dict[str, tuple[BaseWeights, str]] = {}
        self.acted = None
        self.read = False
        self.merged_adapters: list[str] = []
        # while merged: the weight as it was, so that unmerging is exact
        self.register_buffer("fastspec_base_weight", None, persistent=False)
        self._transposed = not isinstance(base_layer, nn.Linear)  # Conv1D stores [in, out]
        out_features, in_features = self.base_matrix().shape
        self.in_features, self.out_features = in_features, out_features

    @property
    def base_weight(self) -> Tensor:
        """The unmerged weight in the stored layout."""
        kept = self.fastspec_base_weight
        return self.get_base_layer().weight if kept is None else kept  # type: ignore[return-value]

    def base_matrix(self) -> Tensor:
        """The unmerged weight as [out, in], detached."""
        return self._stored(self.base_weight.detach())

    def _stored(self, matrix: Tensor) -> Tensor:
        """From [out, in] to the layout of the base layer's weight, or back."""
        return matrix.mT if self._transposed else matrix

    def add_coefficients(self, adapter: str, shape: tuple[int, ...]) -> None:
        """A new adapter at zero; `use_basis` has to follow before the first forward."""
        zeros = torch.zeros(shape, device=self.base_weight.device)
        self.fastspec_delta[adapter] = nn.Parameter(zeros)

    def shared_basis(self, wanted: Directions) -> FrozenBasis | None:
        """A basis another adapter of this layer brought that holds the wanted triplets."""
        for basis in self.fastspec_basis.values():
            assert isinstance(basis, FrozenBasis)
            if basis.offset_of(wanted) is not None:
                return basis
        return None

    def use_basis(
        self, adapter: str, core: Core, basis: FrozenBasis, directions: Directions
    ) -> None:
        """Say what the adapter's coefficients stand between: `directions`, which `basis` holds."""
        offset = basis.offset_of(directions)
        assert offset is not None
        self.fastspec_basis[adapter] = basis
        self.fastspec_form[adapter] = Form(core, offset)

    def factors(self, adapter: str) -> Factors:
        """The adapter's factors: views of the basis it shares."""
        self._follow_weight()
        return self.factors_as_made(adapter)

    def factors_as_made(self, adapter: str) -> Factors:
        """The same of the weight as the last call saw it."""
        basis = self.fastspec_basis[adapter]
        assert isinstance(basis, FrozenBasis)
        start = self.fastspec_form[adapter].offset
        stop = start + self.fastspec_delta[adapter].shape[-1]
        f = basis.factors
        if stop - start == len(f.s):
            return f
        return Factors(f.u[:, start:stop], f.s[start:stop], f.vh[start:stop], f.singular)

    def core_matrix(self, adapter: str) -> Tensor:
        """The adapter's core C [k, k]."""
        return core_matrix(self.fastspec_delta[adapter], self.fastspec_form[adapter].core)

    def update_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Thin factors [out, r] and [r, in] of the adapter's update U C Vh, in float32 at least."""
        f, core = self.factors(adapter), self.fastspec_form[adapter].core
        wide = torch.promote_types(f.u.dtype, torch.float32)
        return update_factors(f, self.fastspec_delta[adapter], core, wide)

    def forward(self, x: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters:
            return self.base_layer(x)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names)
        active = [name for name in self.active_adapters if name in self.fastspec_delta]
        if self.merged or not active:
            return self.base_layer(x)
        return self._adapted(x, active)

    def _adapted(self, x: Tensor, adapters: list[str]) -> Tensor:
        """The whole batch through the given adapters together."""
        f, delta, core = self._combined(adapters)
        return spectral_linear(
            x, *self._frozen(), f.u, f.s, f.vh, delta, core=core, singular_basis=f.singular
        )

    def _frozen(self) -> tuple[Tensor, Tensor | None]:
        base: Any = self.get_base_layer()
        return self._stored(base.weight), base.bias

    def _combined(self, adapters: list[str]) -> tuple[Factors, Tensor, Core]:
        """One adapter that does what the given ones do together: W + sum_a U_a C_a Vh_a."""
        first = adapters[0]
        core, deltas = self.fastspec_form[first].core, [self.fastspec_delta[a] for a in adapters]
        if len(adapters) == 1:
            return self.factors(first), deltas[0], core
        if all(self._kind(a) == self._kind(first) for a in adapters):
            return self.factors(first), summed(deltas, [1.0] * len(deltas), core), core
        parts = [self.factors(a) for a in adapters]
        factors = Factors(
            torch.cat([f.u for f in parts], dim=1),
            torch.cat([f.s for f in parts]),
            torch.cat([f.vh for f in parts]),
            singular=False,
        )
        return factors, torch.block_diag(*(self.core_matrix(a) for a in adapters)), "dense"

    def _kind(self, adapter: str) -> tuple:
        """What two adapters must have in common for their coefficients to be added or stacked."""
        delta = self.fastspec_delta[adapter]
        return id(self.fastspec_basis[adapter]), self.fastspec_form[adapter], delta.shape

    def _mixed_batch(self, x: Tensor, names: list[str]) -> Tensor:
        """Each row of x [rows, ..., in] through the adapter it names."""
        if len(names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )
        groups: dict[tuple | None, list[int]] = {}
        for row, name in enumerate(names):
            kind = self._kind(name) if name in self.fastspec_delta else None
            groups.setdefault(kind, []).append(row)
        if len(groups.keys() - {None}) <= 1:
            return self._tabled(x, names)
        parts = [self._tabled(x[rows], [names[row] for row in rows]) for rows in groups.values()]
        order = torch.tensor([row for rows in groups.values() for row in rows], device=x.device)
        return torch.cat(parts)[order.argsort()]

    def _tabled(self, x: Tensor, names: list[str]) -> Tensor:
        """Rows that name adapters of one kind, or none: their cores in one table, one call."""
        adapters = sorted({name for name in names if name in self.fastspec_delta})
        if not adapters:
            return self.base_layer(x)
        if all(name == adapters[0] for name in names):
            return self._adapted(x, adapters)
        position = {name: i for i, name in enumerate(adapters)}
        task = torch.tensor([position.get(name, -1) for name in names], device=x.device)
        f, core = self.factors(adapters[0]), self.fastspec_form[adapters[0]].core
        table = torch.stack([self.fastspec_delta[name] for name in adapters])
        return task_linear(
            x, *self._frozen(), f.u, f.s, f.vh, table, task, core=core, singular_basis=f.singular
        )

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """U C Vh of an adapter, in the base weight's layout, float32 at least."""
        left, right = self.update_factors(adapter)
        with full_precision(left.device.type):
            return self._stored(left @ right)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let the base layer's weight hold W + U C Vh of the given adapters, by default the active ones.

        The sum is made in float32 at least from the unmerged weight, which is kept until `unmerge`.

        Raises:
            ValueError: with `safe_merge`, if the result is not finite; the layer stays as it was.
        """
        if self.acted is False:
            names = sorted({name for _, name in self.fastspec_origin.values()})
            warn_passed_by(names, "any call so far (so they stay unmerged)")
            return
        adapters = [
            a for a in check_adapters_to_merge(self, adapter_names) if a in self.fastspec_delta
        ]
        if not adapters:
            return
        base = self.get_base_layer()
        merged = [
            (self.factors(a), self.fastspec_delta[a], self.fastspec_form[a].core)
            for a in (*self.merged_adapters, *adapters)
        ]
        weight = self._stored(merged_weight(self.base_matrix(), *merged))
        if safe_merge and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be "
                "broken"
            )
        if not self.merged:
            self.register_buffer("fastspec_base_weight", base.weight, persistent=False)  # type: ignore
        base.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self._merged_seen = Seen(base.weight)
        self.merged_adapters += adapters

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit.

        Raises:
            ValueError: the weight was changed in place while it was merged, which would be lost.
        """
        base: Any = self.get_base_layer()
        if self.merged and self._merged_seen.written(base.weight):
            raise ValueError(
                "a weight was changed in place while it was merged, which unmerging would lose: "
                "merge_and_unload() keeps it"
            )
        self._drop_merged()

    def _drop_merged(self) -> None:
        kept = self.fastspec_base_weight
        if kept is None:
            return
        if not isinstance(kept, nn.Parameter):  # moved or cast while merged
            kept = nn.Parameter(kept, requires_grad=False)
        self.get_base_layer().weight = kept
        self.fastspec_base_weight = None
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """As PEFT's, but for the device alone: coefficients stay float32."""
        delta = self.fastspec_delta.get(adapter_name)
        if delta is not None and delta.device.type != "meta":
            self.fastspec_delta[adapter_name] = delta.to(device or self.base_weight.device)

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
        given = state_dict.get(prefix + "base_layer.weight")
        if given is not None:
            self._drop_merged()
            self._made_from.forget()
            shifted = any(
                bool(tensor.any())
                for name, tensor in state_dict.items()
                if name.startswith(f"{prefix}fastspec_delta.")
            )
            if is_quantised(given):
                error_msgs.append(
                    f"{prefix}base_layer.weight: it is quantised in the state dict "
                    f"({type(given.data).__name__}) and not here: load a state dict of the float model"
                )
            elif shifted and not self.knows(given):
                error_msgs.append(
                    f"{prefix}base_layer.weight: the basis was made from other weights than these (or the "
                    "state dict was saved while merged): load the base model first, adapt it afterwards"
                )
        for name in state_dict:
            if name.startswith(f"{prefix}fastspec_delta.") and not bool(
                torch.isfinite(state_dict[name]).all()
            ):
                error_msgs.append(f"{name} holds NaN or infinity")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}"]
        for name, delta in self.fastspec_delta.items():
            core, k = self.fastspec_form[name].core, delta.shape[-1]
            call = LayerCall(
                2048,
                self.in_features,
                self.out_features,
                k,
                core=core,
                dtype=self.base_weight.dtype,
                device=self.base_weight.device.type,
                needs_delta=delta.requires_grad,
                singular_basis=self.factors(name).singular,
            )
            kind = label(core, delta)
            parts.append(f"{name}: {kind} of rank {k}, plan={make_plan(call)} at 2048 rows")
        if self.merged:
            parts.append(f"merged={self.merged_adapters}")
        return ", ".join(parts)
