"""What of a model is adapted: its linear layers, and its heads, which are trained whole."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from fastspec.config import Rank, SpectralConfig, resolve_rank
from fastspec.nn.layer import SpectralLayer
from fastspec.nn.quantized import float_dtype, quantised
from fastspec.svd.factors import Directions

# what switches off torch's fused path of an encoder; of the second, with nested inputs
FUSED: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
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

    @property
    def quantised(self) -> bool:
        """Whether the weight is quantised, so that `matrix` holds no numbers to factorise."""
        return quantised(self.module.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return _shape(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return float_dtype(self.module.weight) if self.quantised else self.matrix.dtype


def find_targets(
    model: nn.Module, config: SpectralConfig, *, factors_given: bool = False
) -> tuple[list[Target], tuple[str, ...]]:
    """The layers `config` means, checked, and the names of the modules trained whole.

    Args:
        model, config: as of `spectralize`.
        factors_given: whether the factors come from elsewhere: then weights may be quantised.

    Raises:
        ValueError, TypeError: as `spectralize`.
    """
    _check_names(model, config)
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
    served: set[int] = set()  # ranks that some layer has room for
    lowered: dict[int, tuple[str, int]] = {}  # and those that a tiny one has not
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
        asked = _rank_of(name, config)
        if asked is None:
            continue
        check_layer(name, module, factors_given)
        side = min(_shape(module))
        rank = resolve_rank(asked, side)
        if rank <= side:
            served.add(rank)
        elif explicit and not isinstance(config.target_modules, str):
            raise _too_high(name, rank, side)
        else:
            lowered.setdefault(rank, (name, side))
            rank = side
        directions = Directions(rank, config.select, config.basis, config.tol, config.seed)
        try:
            directions.triplets(side)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
        targets.append(Target(name, module, directions))
    _check_heads(model, config, (*heads, *kept_out))
    for rank, (name, side) in lowered.items():
        if rank not in served:
            raise _too_high(name, rank, side)
    if not targets:
        linear = [n for n, m in model.named_modules() if _is_linear(m)]
        shown = ", ".join(linear[:8]) + (", ..." if len(linear) > 8 else "")
        raise ValueError(
            f"target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r} matches no linear layer; the model has: {shown or 'none'}"
        )
    return targets, heads


def _check_names(model: nn.Module, config: SpectralConfig) -> None:
    """Refuse a name or pattern of the config that means nothing in this model, as a misspelt one does."""
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field)
        for pattern in () if isinstance(value, str) else value:
            if not any(map(matcher([pattern]), linear)):
                inside = [name for name in linear if f".{pattern}." in f".{name}"]
                hint = f"; inside it are {', '.join(inside[:4])}" if inside else ""
                raise ValueError(
                    f"{field} names {pattern!r}, which is no linear layer of this model{hint}; the model "
                    f"has: {', '.join(linear[:8])}{', ...' if len(linear) > 8 else ''}"
                )
    excluded = config.exclude_modules
    if isinstance(excluded, str) and not any(map(matcher(excluded), linear)):
        raise ValueError(
            f"exclude_modules={excluded!r} is one regular expression, which matches the whole name of no "
            f"linear layer; names go in a list: [{excluded!r}]; the model has: {', '.join(linear[:8])}"
        )
    if isinstance(config.rank, Mapping):
        for pattern in config.rank:
            if pattern != "default" and not any(re.search(pattern, name) for name in linear):
                raise ValueError(f"rank has the pattern {pattern!r}, which no linear layer matches")


def _check_heads(model: nn.Module, config: SpectralConfig, heads: Sequence[str]) -> None:
    """Refuse a target that only means heads and output layers, which are not adapted."""
    inside = tuple(f"{head}." for head in heads)
    patterns = config.target_modules
    for pattern in () if isinstance(patterns, str) else patterns:
        means = matcher([pattern])
        found = [n for n, module in model.named_modules() if _is_linear(module) and means(n)]
        if all(f"{name}.".startswith(inside) for name in found):
            raise ValueError(
                f"target_modules names {pattern!r}, which is a head or output layer ({found[0]}): these are "
                "trained whole, by modules_to_save, and never adapted"
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel, DataParallel or an averaged copy.

    They keep it as a submodule, so that its names would begin with `_orig_mod.` or `module.`.
    """
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
        ):
            inner = model.module
        if inner is None:
            return model
        model = inner


def spectral_layers(model: nn.Module) -> Iterator[tuple[str, SpectralLayer]]:
    """Names and modules of the adapted layers."""
    for name, module in model.named_modules():
        if isinstance(module, SpectralLayer):
            yield name, module


def layers_by_name(model: nn.Module) -> dict[str, SpectralLayer]:
    return dict(spectral_layers(model))


def avoid_fused_inference(model: nn.Module) -> None:
    """Switch off torch's fused encoder path, which reads the linear layers' weights past their forward."""
    for module in model.modules():
        for kind, (name, off) in FUSED.items():
            if isinstance(module, kind):
                module.__dict__.setdefault("_fused_inference", getattr(module, name))
                setattr(module, name, off)


def allow_fused_inference(model: nn.Module) -> None:
    """Undo `avoid_fused_inference`."""
    for module in model.modules():
        for kind, (name, _) in FUSED.items():
            if isinstance(module, kind) and "_fused_inference" in module.__dict__:
                setattr(module, name, module.__dict__.pop("_fused_inference"))


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


def _shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    n_in, n_out = module.weight.shape
    return n_out, n_in


def check_layer(name: str, module: nn.Module, factors_given: bool = False) -> None:
    # before the weight is looked at: a parametrised one is made then, and may move its own state
    own = {"weight", "bias"} <= module._parameters.keys()
    if parametrize.is_parametrized(module) or not own:
        raise TypeError(
            f"{name}: the weight or bias is made anew from other parameters at every use (weight_norm, "
            "pruning, parametrizations): remove that first, or name the layer in exclude_modules"
        )
    weight: Any = module.weight
    if is_lazy(weight):
        raise ValueError(f"{name}: a lazy layer without weights yet: run the model once first")
    if factors_given and quantised(weight) and "forward" not in module.__dict__:
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{name}: in a call without gradients bitsandbytes packed the weight anew for this CPU, from "
                "which nothing trains: adapt the model before it is called, or load it again"
            )
        return
    kind = type(weight.data if isinstance(weight, nn.Parameter) else weight)
    if not weight.is_floating_point() or kind is not Tensor:
        raise TypeError(
            f"{name}: the weight is quantised or of a special kind ({kind.__name__}, {weight.dtype}); "
            "expected a plain floating-point tensor: load the model unquantised, or make the factors of its "
            "float weights by fastspec factorize and give them as spectralize(model, config, basis=FILE), "
            "which torchao's weights and bitsandbytes' in 4 bits take"
        )
    if weight.device.type == "meta":
        raise ValueError(
            f"{name}: the weight is on the meta device, without values: load the weights first"
        )
    if weight.layout != torch.strided:
        raise TypeError(f"{name}: the weight is sparse ({weight.layout}); expected a dense one")
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
        raise TypeError(
            f"{name}: its forward was replaced on the instance, which would go on calling the plain "
            "layer: undo that first and wrap the adapted layer, or name it in exclude_modules"
        )
    if module.__dict__.get("_compiled_call_impl") is not None or name.endswith("_orig_mod"):
        raise TypeError(
            f"{name}: the layer itself was compiled, which would go on calling the plain layer: compile it "
            "after adapting it, or name it in exclude_modules"
        )
    own_forward = type(module).forward is not nn.Linear.forward
    if isinstance(module, nn.Linear) and own_forward and not _computes_linear(module):
        raise TypeError(
            f"{name}: {type(module).__name__} is an nn.Linear with a forward of its own, which the "
            "spectral layer would replace: name it in exclude_modules"
        )


@torch.no_grad()
def _computes_linear(module: nn.Linear) -> bool:
    """Whether a subclass with a forward of its own still computes x W^T + b and holds nothing else."""
    state = {*module._parameters, *module._buffers, *module._modules}
    if state != {"weight", "bias"}:
        return False
    weight = module.weight
    x = torch.linspace(-1, 1, 2 * module.in_features, device=weight.device, dtype=weight.dtype)
    x = x.view(2, -1)
    try:
        y = type(module).forward(module, x)
    except Exception:  # it takes more than x
        return False
    wanted = F.linear(x, weight, module.bias)
    close = 64 * torch.finfo(weight.dtype).eps * (x.abs() @ weight.abs().mT).amax()
    return y.shape == wanted.shape and bool(((y - wanted).abs() <= close).all())


def _too_high(name: str, rank: int, side: int) -> ValueError:
    return ValueError(
        f"{name}: rank {rank} is above min(in, out) = {side}; "
        "give a smaller rank, a fraction, or 'full'"
    )


def _rank_of(name: str, config: SpectralConfig) -> Rank | None:
    """The rank that the config means for a layer, which may be above its short side; None: leave it plain."""
    if not isinstance(config.select, str):
        return config.select[1] - config.select[0]
    if isinstance(config.rank, Mapping):
        patterns = (p for p in config.rank if p != "default" and re.search(p, name))
        return config.rank.get(next(patterns, "default"))
    return config.rank


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
    heads = _found_heads(model)
    kept_out = [*output_layer_names(model), *heads]
    if config.modules_to_save is not None:
        heads = _named_heads(model, config.modules_to_save)
    return tuple(heads), tuple(kept_out)


def output_layer_names(model: nn.Module) -> list[str]:
    """Names of a language model's output layer, which is pretrained."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [] if output is None else [n for n, m in model.named_modules() if m is output]


def unsaved_heads(model: nn.Module, saved: Collection[str]) -> list[str]:
    """Names of the heads that an adapter does not hold, whose `modules_to_save` is `saved`."""
    return [head for head in _found_heads(model) if head not in saved]


def _found_heads(model: nn.Module) -> list[str]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
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
    return heads


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
