"""The layer over a quantised base: W in 8 or 4 bits by torchao or bitsandbytes, all else in float.

y = x W_q^T + b + core(x Vh^T) U^T
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastspec.cores import core_matrix
from fastspec.fingerprint import tensor_fingerprint, tensors_fingerprint
from fastspec.nn.batch_tasks import tasks_of_batch
from fastspec.nn.linear import SpectralLinear
from fastspec.nn.made_from import MadeFrom, Seen, is_quantised
from fastspec.ops.low_rank import low_rank_linear
from fastspec.ops.plan import Plan
from fastspec.svd.factors import Factors


def quantised(weight: Any) -> bool:
    """Whether a weight is one of torchao's, or of bitsandbytes' in 4 bits, with values already."""
    return is_quantised(weight) or getattr(weight, "quant_state", None) is not None


def float_dtype(weight: Any) -> torch.dtype:
    """The dtype that a quantised weight computes in."""
    state = getattr(weight, "quant_state", None)
    return weight.dtype if state is None else state.dtype  # type: ignore[no-any-return]


def dequantised(weight: Any) -> Tensor:
    """The values [out, in] of a quantised weight."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().dequantize()  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]


class QuantizedSpectralLinear(SpectralLinear):
    """A `SpectralLinear` whose `weight` is a quantised tensor with a matrix product of its own.

    Only the product x W^T reads the weight: `_plain`, by the tensor's own `F.linear` (torchao) or by its
    `quant_state` (bitsandbytes). What needs W as a matrix (merging, factorising, mixed batches of tasks) is
    refused.
    """

    def forward(self, x: Tensor) -> Tensor:
        if tasks_of_batch(self.task_bank) is not None:
            self._refuse("mixed batches of tasks")
        y = self._plain(x)
        if self.core == "low_rank":
            device = x.device.type
            if torch.is_autocast_enabled(device):
                x = x.to(torch.get_autocast_dtype(device))
            trains = self.delta.requires_grad and torch.is_grad_enabled()
            return y + low_rank_linear(
                x, None, None, self.u, self.vh, self.delta, "factored", trains
            )
        # p [N, k] is all that autograd keeps of x here (F1)
        p = F.linear(x, self.vh.to(x.dtype))
        core = core_matrix(self.delta, self.core)
        z = p.to(core.dtype) @ core.mT
        return y + F.linear(z.to(p.dtype), self.u.to(p.dtype))

    def _plain(self, x: Tensor) -> Tensor:
        state = getattr(self.weight, "quant_state", None)
        if state is None:
            return super()._plain(x)
        from bitsandbytes import matmul_4bit

        compute = getattr(self, "compute_dtype", None) or x.dtype  # of bitsandbytes' own layer
        bias = None if self.bias is None else self.bias.to(compute)
        y = matmul_4bit(x.to(compute), self.weight.t(), bias=bias, quant_state=state)
        return y.to(x.dtype)  # type: ignore[no-any-return]

    def plan(self, n: int, *, needs_dx: bool = True) -> Plan:
        return Plan("factored", "two_sided" if self.delta.requires_grad else "none")

    def _merged_weight(self) -> Tensor:
        self._refuse("merging")

    def unload(self, merged: bool = True) -> nn.Module:
        # a plain nn.Linear has no product of its own with bitsandbytes' numbers
        plain = self._plain_class is nn.Linear and hasattr(self.weight, "quant_state")
        if merged or plain:
            self._refuse("unloading")
        return super().unload(merged)

    def _follow(self, factors: Factors | None) -> None:
        assert factors is not None
        self.__dict__.pop("extra_repr", None)  # torchao's, on the instance
        self._hold(factors)
        self._made_from, self._merged_seen = MadeFrom(), Seen()  # the float weight is not here

    def keep_merged(self, keep: bool = True) -> None:
        if keep:
            self._refuse("a merged copy")
        super().keep_merged(keep)

    def refactorize(self) -> None:
        self._refuse("making the factors again")

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:  # under the names that bitsandbytes' own layers give its parts
            parts = state.as_dict(packed=True)
            destination |= {f"{prefix}weight.{name}": part for name, part in parts.items()}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        weight = prefix + "weight"
        if hasattr(self.weight, "quant_state") and weight in state_dict:
            own = {n: t for n, t in state_dict.items() if n == weight or n.startswith(f"{weight}.")}
            parts = {n[len(weight) + 1 :]: t for n, t in own.items()}
            if tensors_fingerprint(parts) == tensor_fingerprint(self.weight):
                others = {n: t for n, t in state_dict.items() if n not in own}
                state_dict = others | {weight: self.weight}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _why_not_load(self, given: Tensor) -> str | None:
        if tensor_fingerprint(given) == tensor_fingerprint(self.weight):
            return None
        return (
            "the base here is quantised, and its factors are those of the float weight before that; the "
            f"state dict holds other values ({type(given.data).__name__}, {given.dtype}): load it before "
            "quantize_base(), or leave the weights out and load with strict=False"
        )

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{what} needs the base weight in floating point, and it is quantised: adapt the float model for "
            "that (an adapter that was trained over quantised weights is refused there)"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={type(self.weight.data).__name__}"
