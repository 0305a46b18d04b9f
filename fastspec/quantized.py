"""A weight-only quantised base: W in int8 or int4 by torchao, U, Vh and the coefficients in float.

    y = x W_q^T + b + core(x Vh^T) U^T

The factors are made from the weight as it was before quantising. `fastspec memory MODEL` prints what each
base costs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastspec import reference
from fastspec.config import SpectralConfig
from fastspec.convert import spectralize
from fastspec.multitask.rows import current_rows
from fastspec.nn import SpectralLinear
from fastspec.plan import Plan
from fastspec.targets import spectral_layers


class QuantizedSpectralLinear(SpectralLinear):
    """A `SpectralLinear` whose `weight` is a quantised tensor with a matrix product of its own.

    Only the product x W^T reads the weight, so any tensor subclass that serves `F.linear` will do. What
    needs W as a matrix (merging, factorising, mixed batches of tasks) is refused.
    """

    def forward(self, x: Tensor) -> Tensor:
        if current_rows(self.task_bank) is not None:
            self._refuse("mixed batches of tasks")
        y = self._plain(x)
        # p [N, k] is all that autograd keeps of x here (F1)
        p = F.linear(x, self.vh.to(x.dtype))
        core = reference.core_matrix(self.delta, self.core)
        z = p.to(core.dtype) @ core.mT
        return y + F.linear(z.to(p.dtype), self.u.to(p.dtype))

    def plan(self, n: int, *, needs_dx: bool = True) -> Plan:
        return Plan("factored", "two_sided" if self.delta.requires_grad else "none")

    def _merged_weight(self) -> Tensor:
        self._refuse("merging")

    def refactorize(self) -> None:
        self._refuse("making the factors again")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{what} needs the base weight in floating point, and it is quantised: load the adapter "
            "into the unquantised model for that"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={type(self.weight.data).__name__}"


def quantize_base(model: nn.Module, config: Any) -> nn.Module:
    """Quantise the weights of the adapted layers, in place.

    Call it after `spectralize`, which takes its factors from the weights as they are, and after
    `load_adapter` for adapters of the unquantised model. An adapter saved afterwards belongs to the
    quantised base.

    Args:
        model: a spectralized model, unmerged. The `Conv1D` layers of GPT-2 stay as they are.
        config: a weight-only configuration of torchao, such as `Int8WeightOnlyConfig()` or
            `IntxWeightOnlyConfig(torch.int4, PerGroup(32))`. torchao's packed int4 products on a CPU have
            no gradient: they serve, but do not train.

    Returns:
        The same model.

    Raises:
        ImportError: torchao is not installed (extra "quant").
        ValueError: nothing to quantise, or a layer is merged or quantised already.
    """
    try:
        from torchao.quantization import quantize_
    except ImportError as e:
        raise ImportError(
            f"quantize_base needs torchao: pip install 'fastspec[quant]' ({e})"
        ) from e
    layers = [(n, m) for n, m in spectral_layers(model) if isinstance(m, SpectralLinear)]
    if not layers:
        raise ValueError(
            "the model has no adapted nn.Linear: call fastspec.spectralize(model) first"
        )
    for name, layer in layers:
        if layer.merged or isinstance(layer, QuantizedSpectralLinear):
            state = "merged" if layer.merged else "quantised already"
            raise ValueError(f"{name} is {state}: expected a layer with its float base weight")
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, SpectralLinear))
    for _, layer in layers:
        layer.__dict__.pop("extra_repr", None)  # torchao puts its own on the instance
        layer.__class__ = QuantizedSpectralLinear
    return model


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take, quantised ones by what they are made of; each tensor counts once."""
    total = 0
    for tensor in {id(t): t for t in tensors}.values():
        if type(tensor.data) is not Tensor and hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            total += stored_bytes(getattr(tensor, name) for name in names)
        else:
            total += tensor.nbytes
    return total


def memory_table(model: nn.Module, config: SpectralConfig) -> list[dict[str, Any]]:
    """Bytes of a plain float32 model adapted over each base: weights, factors, coefficients, rest."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig

    adapted = spectralize(model, config)
    bases = {
        "float32": lambda m: m,
        "bfloat16": lambda m: m.to(torch.bfloat16),
        "int8": lambda m: quantize_base(m, Int8WeightOnlyConfig()),
        "int4, groups of 32": lambda m: quantize_base(
            m, PrototypeInt4WeightOnlyConfig(group_size=32)
        ),
    }
    rows = []
    for base, convert in bases.items():
        converted = convert(copy.deepcopy(adapted))
        layers = [layer for _, layer in spectral_layers(converted)]
        parts = {
            "adapted weights": [layer.weight for layer in layers],
            "factors": [t for layer in layers for t in (layer.u, layer.s, layer.vh)],
            "coefficients": [layer.delta for layer in layers],
        }
        counted = {id(t) for part in parts.values() for t in part}
        parts["rest"] = [p for p in converted.parameters() if id(p) not in counted]
        rows.append({"base": base} | {name: stored_bytes(part) for name, part in parts.items()})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or name of a transformers model")
    parser.add_argument("--rank", type=int, default=32, help="directions a layer (default: 32)")


def main(args: argparse.Namespace) -> int:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(args.model, dtype=torch.float32)
    rows = memory_table(model, SpectralConfig(rank=args.rank))
    columns = [name for name in rows[0] if name != "base"]
    print(f"{'MB':20}" + "".join(f"{name:>17}" for name in (*columns, "total")))
    for row in rows:
        sizes = [row[name] for name in columns]
        print(f"{row['base']:20}" + "".join(f"{n / 1e6:17.2f}" for n in (*sizes, sum(sizes))))
    return 0
