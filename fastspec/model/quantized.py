"""`quantize_base`: an adapted model's weights in 8 or 4 bits; `fastspec memory`: what each base costs.

The factors are made from the weight as it was before quantising.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.availability import install_advice
from fastspec.config import SpectralConfig
from fastspec.model.convert import spectralize
from fastspec.model.targets import spectral_layers
from fastspec.nn.linear import SpectralLinear
from fastspec.nn.made_from import MadeFrom
from fastspec.nn.quantized import QuantizedSpectralLinear

FORMATS = ("nf4", "fp4")  # of bitsandbytes


def quantize_base(model: nn.Module, config: Any) -> nn.Module:
    """Quantise the weights of the adapted layers, in place.

    Call it after `spectralize`, which takes its factors from the weights as they are, and after
    `load_adapter` for adapters of the unquantised model. An adapter saved afterwards belongs to the
    quantised base.

    Args:
        model: a spectralized model, unmerged. The `Conv1D` layers of GPT-2 stay as they are.
        config: a weight-only configuration of torchao, such as `Int8WeightOnlyConfig()` or
            `IntxWeightOnlyConfig(torch.int4, PerGroup(32))`. torchao's packed int4 products on a CPU have
            no gradient: they serve, but do not train. Or `"nf4"` or `"fp4"`, the number formats of
            bitsandbytes in blocks of 64, which train.

    Returns:
        The same model.

    Raises:
        ImportError: torchao (extra "quant") or bitsandbytes is not installed.
        ValueError: nothing to quantise, an unknown format, or a layer is merged or quantised already.
    """
    layers = [(n, m) for n, m in spectral_layers(model) if isinstance(m, SpectralLinear)]
    if not layers:
        raise ValueError(
            "the model has no adapted nn.Linear: call fastspec.spectralize(model) first"
        )
    for name, layer in layers:
        if layer.merged or isinstance(layer, QuantizedSpectralLinear):
            state = "merged" if layer.merged else "quantised already"
            raise ValueError(f"{name} is {state}: expected a layer with its float base weight")
    plain = [layer for _, layer in layers]
    if isinstance(config, str):
        _by_bitsandbytes(plain, config)
    else:
        _by_torchao(plain, config)
    for layer in plain:
        layer.__class__ = QuantizedSpectralLinear
        layer._made_from = MadeFrom()  # the float weight is gone
    return model


def _by_torchao(layers: list[SpectralLinear], config: Any) -> None:
    try:
        from torchao.quantization import quantize_
    except ImportError as e:
        raise ImportError(f"quantize_base needs torchao ({e}); {install_advice('quant')}") from e
    for layer in layers:
        quantize_(layer, config, filter_fn=lambda module, name: isinstance(module, SpectralLinear))
        layer.__dict__.pop("extra_repr", None)  # torchao puts its own on the instance


def _by_bitsandbytes(layers: list[SpectralLinear], number_format: str) -> None:
    if number_format not in FORMATS:
        raise ValueError(
            f"config must be a configuration of torchao or one of {FORMATS}, got {number_format!r}"
        )
    try:
        from bitsandbytes.nn import Params4bit
    except ImportError as e:
        raise ImportError(
            f"quantize_base to {number_format!r} needs bitsandbytes: pip install bitsandbytes ({e})"
        ) from e
    for layer in layers:
        weight: Any = Params4bit(layer.weight.data, requires_grad=False, quant_type=number_format)
        layer.weight = weight.to(weight.device)  # its `to` is what packs the values


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take, quantised ones by what they are made of; each tensor counts once."""
    total = 0
    for tensor in {id(t): t for t in tensors}.values():
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            total += tensor.nbytes + state.absmax.nbytes
        elif type(tensor.data) is not Tensor and hasattr(tensor, "__tensor_flatten__"):
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
    if importlib.util.find_spec("bitsandbytes") is not None:
        bases["nf4"] = lambda m: quantize_base(m, "nf4")
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
