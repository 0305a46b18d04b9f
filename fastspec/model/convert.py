"""A whole model: convert its linear layers, count what is trained, merge and unmerge."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastspec.config import SpectralConfig
from fastspec.model.buffers import buffer_digests
from fastspec.model.given_factors import factors_from_file
from fastspec.model.merging import rehook, replace_modules, write_merged
from fastspec.model.passed_by import FirstCalls
from fastspec.model.targets import (
    Target,
    avoid_fused_inference,
    find_targets,
    is_norm,
    layers_by_name,
    matcher,
    spectral_layers,
    unwrap,
)
from fastspec.nn.layer import SpectralLayer
from fastspec.nn.linear import SpectralLinear
from fastspec.nn.quantized import QuantizedSpectralLinear, quantised
from fastspec.svd.factors import Factors, factorize


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What `spectralize` left on a model as `model.spectral`.

    Attributes:
        config: as it was given.
        modules_to_save: names of the modules trained whole.
        buffers: a digest of each persistent buffer, by which it shows later that one moved.
    """

    config: SpectralConfig
    modules_to_save: tuple[str, ...]
    buffers: dict[str, str] = dataclasses.field(repr=False)


@torch.inference_mode(False)  # what is made here is trained elsewhere
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
            for the weight with its fingerprint. Made of a model's float weights it also serves the model
            loaded in 8 or 4 bits (torchao, bitsandbytes' 4 bits), by the layers' names.
        progress: show a bar while factorising; None shows it once that has taken over a second.

    Returns:
        The same model, with its `Adaptation` as the attribute `spectral`.

    Raises:
        ValueError, TypeError: nothing matches, the model is adapted already, a rank is above
            min(in, out), a weight is quantised, on the meta device or not finite, or the basis file
            does not fit. The message names the module, and the model is unchanged.
    """
    config = config or SpectralConfig()
    wrapper, model = model, unwrap(model)
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel already, which has made its list of what "
            "is trained: call spectralize first"
        )
    targets, heads = find_targets(model, config, factors_given=basis is not None)

    def make(unique: list[Target]) -> list[Factors]:
        if basis is not None:
            return factors_from_file(unique, config, basis)
        return computed_factors(unique, progress)

    convert(model, config, targets, heads, shared_factors(targets, make))
    return wrapper


def computed_factors(targets: list[Target], progress: bool | None = None) -> list[Factors]:
    """Factors of targets that share no weight, made from these."""
    return factorize(
        [t.matrix for t in targets],
        [t.directions for t in targets],
        [t.name for t in targets],
        progress=progress,
    )


def shared_factors(
    targets: list[Target], make: Callable[[list[Target]], list[Factors]]
) -> list[Factors]:
    """Factors of all targets by `make`, which is asked once for each weight that several share."""
    unique: dict[tuple, int] = {}
    representative: list[Target] = []
    index = []
    for target in targets:
        w = target.matrix
        place = id(target.module.weight) if target.quantised else w.data_ptr()
        key = (place, tuple(w.shape), w.stride(), target.directions)
        if key not in unique:
            unique[key] = len(representative)
            representative.append(target)
        index.append(unique[key])
    factors = make(representative)
    return [factors[i] for i in index]


def convert(
    model: nn.Module,
    config: SpectralConfig,
    targets: list[Target],
    heads: tuple[str, ...],
    factors: list[Factors],
) -> None:
    """Put adapted layers in place of `targets`, which `find_targets` found with `heads`; freeze the rest."""
    _check_trainable(model, config, heads)
    layers = {id(t.module): _adapted(t, f, config) for t, f in zip(targets, factors, strict=True)}

    buffers = buffer_digests(model)
    # nothing above changed the model; nothing below can fail
    model.requires_grad_(False)
    replace_modules(model, layers)
    write_merged(model)
    FirstCalls(layers_by_name).watch(model)
    avoid_fused_inference(model)
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
    model.spectral = Adaptation(config, heads, buffers)  # type: ignore[assignment]
    warn_of_stacks(model, config.target_modules)


def _check_trainable(model: nn.Module, config: SpectralConfig, heads: tuple[str, ...]) -> None:
    """Refuse what can't be trained and is to be."""
    for name, parameter in model.named_parameters():
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        trained = (
            name.startswith(tuple(f"{head}." for head in heads))
            or (config.train_bias and leaf == "bias")
            or (config.train_layernorm and is_norm(module))
        )
        if trained and (quantised(parameter) or not parameter.is_floating_point()):
            raise ValueError(
                f"{name} is to be trained and is quantised ({type(parameter).__name__}, {parameter.dtype}): "
                "load the model with its module in float, as by BitsAndBytesConfig(llm_int8_skip_modules="
                "[...]) or TorchAoConfig(modules_to_not_convert=[...]), or take it out of modules_to_save"
            )
        if trained and parameter.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode(), so it can't be trained: make or load the "
                "model outside of it"
            )


def warn_of_stacks(model: nn.Module, meant: str | Sequence[str] = "all-linear") -> None:
    """Say that stacks of matrices (experts in one parameter) stay plain, where they are much of the model.

    Args:
        meant: the `target_modules` by which they are meant. A name of it means a stack that it is part of
            (`gate_proj` means `gate_up_proj`).
    """
    if isinstance(meant, str):
        means = matcher(meant)
    else:
        words = [set(name.rpartition(".")[2].split("_")) for name in meant]

        def means(name: str) -> bool:
            held = set(name.rpartition(".")[2].split("_"))
            return any(part <= held for part in words)

    stacks = {
        f"{name}.{leaf}".lstrip("."): parameter.numel()
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
        and means(f"{name}.{leaf}".lstrip("."))
        and min(parameter.shape[1:]) >= 8
        and not isinstance(module, nn.modules.conv._ConvNd)
    }
    share = sum(stacks.values()) / max(1, sum(p.numel() for p in model.parameters()))
    if stacks and (meant != "all-linear" or share > 0.01):
        warnings.warn(
            f"{share:.0%} of the model are stacks of matrices, such as {next(iter(stacks))}, which no "
            "nn.Linear holds: they stay as they are, only the linear layers were adapted",
            stacklevel=4,
        )


def adaptation(model: nn.Module) -> Adaptation | None:
    """What `spectralize` noted on the model; None for a plain one."""
    found: Any = getattr(unwrap(model), "spectral", None)
    return found


def adapted_part(model: nn.Module) -> str | None:
    """The name of a part that is adapted, of a model that is not itself: for messages."""
    return next((name for name, m in model.named_modules() if adaptation(m) is not None), None)


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """Counts of numbers: trainable in the adapter, trainable in the heads, total of all parameters."""
    model = unwrap(model)
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


def _percent(part: int, total: int) -> str:
    return f"{100 * part / total if total else 0:10.4f} %"


def _adapted(target: Target, factors: Factors, config: SpectralConfig) -> SpectralLayer:
    cls: type[SpectralLayer] = QuantizedSpectralLinear if target.quantised else SpectralLinear
    if not isinstance(target.module, nn.Linear):
        from fastspec.nn.conv1d import SpectralConv1D

        cls = SpectralConv1D
    layer = cls.adopt(
        target.module,
        directions=target.directions,
        core=config.core,
        half_width=config.half_width,
        core_rank=config.core_rank,
        path=config.path,
        train_bias=config.train_bias,
        factors=factors,
    )
    rehook(layer)
    return layer
