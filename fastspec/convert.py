"""A whole model: convert its linear layers, count what is trained, merge and unmerge."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastspec.basis import load_basis
from fastspec.config import Rank, SpectralConfig, resolve_rank
from fastspec.nn import Directions, Factors, SpectralLayer, SpectralLinear, factorize

HEAD_NAMES = ("classifier", "score", "head", "heads", "fc", "qa_outputs", "classification_head")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What `spectralize` left on a model as `model.spectral`: its config and the modules trained whole."""

    config: SpectralConfig
    modules_to_save: tuple[str, ...]


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


def spectralize(
    model: nn.Module,
    config: SpectralConfig | None = None,
    *,
    basis: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Adapt a model in place: its linear layers become spectral ones, everything else is frozen.

    Trainable afterwards: the coefficients (`*.delta`), the heads, and what `config` adds. All matrices
    of one shape are factorised as one stack; layers that share a weight share its factors.

    Args:
        model: any module; with Hugging Face models the heads are known exactly, with others by their
            names (`classifier`, `head`, `fc`, ... at the top level).
        config: what to adapt and how; the default is `SpectralConfig()`.
        basis: a file of `fastspec factorize`: its factors are used instead of computing them, each
            for the weight with its fingerprint.
        progress: show a bar while factorising; None shows it once that has taken over a second.

    Returns:
        The same model, with its `Adaptation` as the attribute `spectral`.

    Raises:
        ValueError, TypeError: nothing matches, the model is adapted already, a rank is above
            min(in, out), a weight is quantised, on the meta device or not finite, or the basis file
            does not fit. The message names the module, and the model is unchanged.
    """
    config = config or SpectralConfig()
    targets, heads = find_targets(model, config)

    unique: dict[tuple, int] = {}
    representative: list[Target] = []
    index = []
    for target in targets:
        w = target.matrix
        key = (w.data_ptr(), tuple(w.shape), w.stride(), target.directions)
        if key not in unique:
            unique[key] = len(representative)
            representative.append(target)
        index.append(unique[key])
    if basis is not None:
        factors = _factors_from_file(representative, config, basis)
    else:
        factors = factorize(
            [t.matrix for t in representative],
            [t.directions for t in representative],
            [t.name for t in representative],
            progress=progress,
        )
    layers = {
        id(t.module): _adapted(t, factors[i], config) for t, i in zip(targets, index, strict=True)
    }

    # nothing above changed the model; nothing below can fail
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in layers:
                parent._modules[name] = layers[id(child)]
        if isinstance(parent, nn.TransformerEncoderLayer):
            # its fused inference path reads linear1.weight and linear2.weight past their forward
            parent.activation_relu_or_gelu = 0
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # the same path, with nested inputs
    for _, layer in spectral_layers(model):
        layer.delta.requires_grad_(True)
        if config.train_bias and layer.bias is not None:
            layer.bias.requires_grad_(True)
    if config.train_layernorm:
        for module in model.modules():
            if is_norm(module):
                module.requires_grad_(True)
    for name in heads:
        model.get_submodule(name).requires_grad_(True)
    model.spectral = Adaptation(config, heads)  # type: ignore[assignment]
    return model


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
    wanted = _matcher(config.target_modules)
    excluded = _matcher(config.exclude_modules)
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
        _check_layer(name, module)
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


def adaptation(model: nn.Module) -> Adaptation | None:
    """What `spectralize` noted on the model; None for a plain one."""
    found: Any = getattr(model, "spectral", None)
    return found


def spectral_layers(model: nn.Module) -> Iterator[tuple[str, SpectralLayer]]:
    """Names and modules of the adapted layers."""
    for name, module in model.named_modules():
        if isinstance(module, SpectralLayer):
            yield name, module


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """Counts of numbers: trainable in the adapter, trainable in the heads, total of all parameters."""
    adapted = adaptation(model)
    heads = adapted.modules_to_save if adapted is not None else ()
    counts = {"adapter": 0, "head": 0, "total": 0}
    for name, p in model.named_parameters():
        if name.endswith("base_weight"):
            continue  # a merged layer's second weight
        counts["total"] += p.numel()
        if p.requires_grad:
            in_head = any(name.startswith(h + ".") for h in heads)
            counts["head" if in_head else "adapter"] += p.numel()
    return counts


def print_trainable_parameters(model: nn.Module) -> None:
    """Print adapter, head and total apart, with percentages of the total."""
    counts = trainable_parameters(model)
    total = counts["total"]
    print(
        f"{'trainable in the adapter':26}{counts['adapter']:>15,}{_percent(counts['adapter'], total)}"
    )
    print(f"{'trainable in the heads':26}{counts['head']:>15,}{_percent(counts['head'], total)}")
    print(f"{'all parameters':26}{total:>15,}")


def merge(model: nn.Module) -> nn.Module:
    """Merge every adapted layer (see `SpectralLinear.merge`); `unmerge` undoes it bit for bit.

    Raises:
        ValueError: a merged weight is not finite. The message names the layer; nothing is merged.
    """
    done: list[SpectralLayer] = []
    for name, layer in spectral_layers(model):
        if layer.merged:
            continue
        try:
            layer.merge()
        except ValueError as e:
            for other in done:
                other.unmerge()
            raise ValueError(f"{name}: {e}") from None
        done.append(layer)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put the base weights back."""
    for _, layer in spectral_layers(model):
        layer.unmerge()
    return model


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: torch's own, or a class named so (LlamaRMSNorm)."""
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or (
        type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None
    )


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total if total else 0:10.4f} %"


def _factors_from_file(
    targets: list[Target], config: SpectralConfig, path: str | os.PathLike[str]
) -> list[Factors]:
    if config.basis != "svd":
        raise ValueError(f"a basis file holds singular vectors, but config.basis={config.basis!r}")
    basis = load_basis(path)
    out = []
    for t in targets:
        entry = basis.find(t.module.weight)  # type: ignore[arg-type]
        if entry is None:
            raise ValueError(
                f"{t.name}: {path} holds no factors of this weight: it was made from other weights, "
                "another dtype, or without this layer; make it again with `fastspec factorize`"
            )
        if not isinstance(t.module, nn.Linear):
            entry = entry.transposed()
        matrix = t.matrix
        start, stop = t.directions.triplets(min(matrix.shape))
        if stop > len(entry.s):
            raise ValueError(
                f"{t.name}: {path} holds {len(entry.s)} triplets and triplets {start} to {stop} are "
                "asked for; make it again with a higher --rank"
            )
        out.append(
            Factors(
                entry.u[:, start:stop].to(matrix).contiguous(),
                entry.s[start:stop].to(matrix.device).contiguous(),
                entry.vh[start:stop].to(matrix).contiguous(),
                singular=entry.u.dtype == matrix.dtype,
            )
        )
    return out


def _adapted(target: Target, factors: Factors, config: SpectralConfig) -> SpectralLayer:
    cls: type[SpectralLayer] = SpectralLinear
    if not isinstance(target.module, nn.Linear):
        from fastspec.conv1d import SpectralConv1D

        cls = SpectralConv1D
    return cls.adopt(
        target.module,
        directions=target.directions,
        core=config.core,
        half_width=config.half_width,
        path=config.path,
        train_bias=config.train_bias,
        factors=factors,
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    # by name, so that a model without it never makes us import transformers
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    )


def _check_layer(name: str, module: nn.Module) -> None:
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


def _matcher(pattern: str | Sequence[str]) -> Callable[[str], bool]:
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
        names = [n for n, _ in model.named_modules() if n == pattern or n.endswith("." + pattern)]
        if not names:
            raise ValueError(f"modules_to_save names {pattern!r}, which the model does not have")
        found += [n for n in names if n not in found]
    # a module inside another that is saved whole is saved with it
    return [n for n in found if not any(n.startswith(o + ".") for o in found)]
