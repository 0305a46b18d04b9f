"""What of a model is adapted: its linear layers, and its heads, which are trained whole."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastspec.config import Rank, SpectralConfig, resolve_rank
from fastspec.nn.layer import SpectralLayer
from fastspec.svd.factors import Directions

HEAD_NAMES = ("classifier", "score", "head", "heads", "fc", "qa_outputs", "classification_head")


@dataclasses.dataclass(frozen=True)
class Target:
    """One layer to adapt."""

    name: str
    module: nn.Module
    directions: Directions

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        weight: Any = self.module.weight
        weight = weight.detach()
        return weight if isinstance(self.module, nn.Linear) else weight.mT


def find_targets(model: nn.Module, config: SpectralConfig) -> tuple[list[Target], tuple[str, ...]]:
    """The layers `config` means, checked, and the names of the modules trained whole.

    Raises:
        ValueError, TypeError: as `spectralize`.
    """
    if isinstance(model, nn.Linear) and not isinstance(model, SpectralLayer):
        raise TypeError(
            "model is a single nn.Linear, which can't be replaced in place: "
            "use SpectralLinear.from_linear(linear, rank=...)"
        )
    adapted = next((name for name, _ in spectral_layers(model)), None)
    if adapted is not None:
        raise ValueError(
            f"the model is adapted already ({adapted!r} is a spectral layer): "
            "start from the plain model, or load_adapter() other coefficients into this one"
        )
    heads, kept_out = _heads(model, config)
    wanted = matcher(config.target_modules)
    excluded = matcher(config.exclude_modules)
    explicit = config.target_modules != "all-linear"
    opaque = {
        id(m)
        for parent in model.modules()
        if isinstance(parent, nn.MultiheadAttention)
        for m in parent.modules()
    }
    targets = []
    for name, module in model.named_modules():
        if not _is_linear(module) or not wanted(name) or excluded(name):
            continue
        if any(name == h or name.startswith(h + ".") for h in (*heads, *kept_out)):
            continue
        if id(module) in opaque:
            if explicit:
                raise ValueError(
                    f"{name}: nn.MultiheadAttention reads this layer's weight without calling it, so "
                    "it can't be adapted: leave it out of target_modules"
                )
            continue
        rank = _rank_of(name, config, min(module.weight.shape))
        if rank is None:
            continue
        check_layer(name, module)
        directions = Directions(rank, config.select, config.basis, config.tol, config.seed)
        try:
            directions.triplets(min(module.weight.shape))
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        targets.append(Target(name, module, directions))
    if not targets:
        linear = [n for n, m in model.named_modules() if _is_linear(m)]
        shown = ", ".join(linear[:8]) + (", ..." if len(linear) > 8 else "")
        raise ValueError(
            f"target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r} matches no linear layer; the model has: {shown or 'none'}"
        )
    return targets, heads


def spectral_layers(model: nn.Module) -> Iterator[tuple[str, SpectralLayer]]:
    """Names and modules of the adapted layers."""
    for name, module in model.named_modules():
        if isinstance(module, SpectralLayer):
            yield name, module


def avoid_fused_inference(model: nn.Module) -> None:
    """Switch off torch's fused encoder path, which reads the linear layers' weights past their forward."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # the same path, with nested inputs


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: torch's own, or a class named so (LlamaRMSNorm)."""
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or (
        type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    # by name, so that a model without it never makes us import transformers
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    )


def check_layer(name: str, module: nn.Module) -> None:
    weight: Any = module.weight
    kind = type(weight.data if isinstance(weight, nn.Parameter) else weight)
    if not weight.is_floating_point() or kind is not Tensor:
        raise TypeError(
            f"{name}: the weight is quantised or of a special kind ({kind.__name__}, {weight.dtype}); "
            "expected a plain floating-point tensor: load the model unquantised"
        )
    if weight.device.type == "meta":
        raise ValueError(
            f"{name}: the weight is on the meta device, without values: load the weights first"
        )
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        raise TypeError(
            f"{name}: {type(module).__name__} is an nn.Linear with a forward of its own, which the "
            "spectral layer would replace: name it in exclude_modules"
        )


def _rank_of(name: str, config: SpectralConfig, short_side: int) -> int | None:
    if not isinstance(config.select, str):
        return config.select[1] - config.select[0]
    rank: Rank | None
    if isinstance(config.rank, Mapping):
        patterns = (p for p in config.rank if p != "default" and re.search(p, name))
        rank = config.rank.get(next(patterns, "default"))
        if rank is None:
            return None
    else:
        rank = config.rank
    k = resolve_rank(rank, short_side)
    if k > short_side:
        raise ValueError(
            f"{name}: rank {k} is above min(in, out) = {short_side}; "
            "give a smaller rank, a fraction, or 'full'"
        )
    return k


def matcher(pattern: str | Sequence[str]) -> Callable[[str], bool]:
    """Whether a layer's full name is meant by `target_modules` or `exclude_modules`."""
    if pattern == "all-linear":
        return lambda name: True
    if isinstance(pattern, str):
        regex = re.compile(pattern)
        return lambda name: regex.fullmatch(name) is not None
    names = tuple(pattern)
    return lambda name: any(name == n or name.endswith("." + n) for n in names)


def _heads(model: nn.Module, config: SpectralConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the modules trained whole, and of all output layers, which are never adapted."""
    kept_out: list[str] = []
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        kept_out += [n for n, m in model.named_modules() if m is output]
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and prefix in model._modules:
        children = {n for n in model._modules if n != prefix}
    else:
        children = {n for n in model._modules if n in HEAD_NAMES}
    heads = []
    for name in model._modules:
        child = model._modules[name]
        if name not in children or child is None or next(child.parameters(), None) is None:
            continue
        if output is not None and any(m is output for m in child.modules()):
            continue  # a language model's output layer is pretrained, not a new head
        heads.append(name)
    kept_out += heads
    if config.modules_to_save is not None:
        heads = _named_heads(model, config.modules_to_save)
    return tuple(heads), tuple(kept_out)


def _named_heads(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in wanted:
        names = [n for n, _ in model.named_modules() if n.endswith("." + pattern)]
        if any(n == pattern for n, _ in model.named_modules()):
            names = [pattern]  # a whole name means that module alone
        if not names:
            raise ValueError(f"modules_to_save names {pattern!r}, which the model does not have")
        found += [n for n in names if n not in found]
    # a module inside another that is saved whole is saved with it
    return [n for n in found if not any(n.startswith(o + ".") for o in found)]
