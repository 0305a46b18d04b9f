"""A whole model: convert its linear layers, count what is trained, merge and unmerge."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.config import SpectralConfig
from fastspec.model.targets import (
    Target,
    avoid_fused_inference,
    find_targets,
    is_norm,
    spectral_layers,
    unwrap,
)
from fastspec.nn import together
from fastspec.nn.layer import SpectralLayer
from fastspec.nn.linear import SpectralLinear
from fastspec.svd.basis_file import load_basis
from fastspec.svd.factors import Factors, factorize


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What `spectralize` left on a model as `model.spectral`: its config and the modules trained whole."""

    config: SpectralConfig
    modules_to_save: tuple[str, ...]


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
    wrapper, model = model, unwrap(model)
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel already, which has made its list of what "
            "is trained: call spectralize first"
        )
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
    model.spectral = Adaptation(config, heads)  # type: ignore[assignment]
    if config.target_modules == "all-linear":
        _warn_of_stacks(model)
    return wrapper


def _warn_of_stacks(model: nn.Module) -> None:
    """Say that stacks of matrices (experts in one parameter) stay plain, where they are much of the model."""
    stacks = {
        f"{name}.{leaf}": parameter.numel()
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
        and min(parameter.shape[1:]) >= 8
        and not isinstance(module, nn.modules.conv._ConvNd)
    }
    share = sum(stacks.values()) / max(1, sum(p.numel() for p in model.parameters()))
    if share > 0.01:
        warnings.warn(
            f"{share:.0%} of the model are stacks of matrices, such as {next(iter(stacks))}, which no "
            "nn.Linear holds: they stay as they are, only the linear layers were adapted",
            stacklevel=3,
        )


def adaptation(model: nn.Module) -> Adaptation | None:
    """What `spectralize` noted on the model; None for a plain one."""
    found: Any = getattr(unwrap(model), "spectral", None)
    return found


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


def merge(model: nn.Module) -> nn.Module:
    """Merge every adapted layer (see `SpectralLinear.merge`); `unmerge` undoes it bit for bit.

    Raises:
        ValueError: a merged weight is not finite. The message names the layer; nothing is merged.
    """
    done: list[SpectralLayer] = []
    layers = {name: layer for name, layer in spectral_layers(model) if not layer.merged}
    ready = _merged_together(list(layers.values()))
    for (name, layer), effective in zip(layers.items(), ready, strict=True):
        try:
            layer.merge(effective)
        except ValueError as e:
            for other in done:
                other.unmerge()
            raise ValueError(f"{name}: {e}") from None
        done.append(layer)
    return model


def _merged_together(layers: list[SpectralLayer]) -> list[Tensor | None]:
    """Merged weights of the layers on a GPU, one launch for each kind; None where a layer makes its own."""
    # a quantised weight is a subclass, and its layer says why it can't be merged
    on_gpu = [m for m in layers if m.weight.is_cuda and type(m.weight.data) is Tensor]
    if not on_gpu or importlib.util.find_spec("triton") is None:
        return [None] * len(layers)
    from fastspec.kernels.merge import merge_layers

    with torch.no_grad():
        merged = merge_layers(
            [layer._matrix(layer.weight) for layer in on_gpu],
            [layer.u for layer in on_gpu],
            [layer.vh for layer in on_gpu],
            [layer.delta for layer in on_gpu],
            [layer.core for layer in on_gpu],
        )
    # `_matrix` undoes itself: the identity, or a transposition
    found = {
        id(layer): None if w is None else layer._matrix(w)
        for layer, w in zip(on_gpu, merged, strict=True)
    }
    return [found.get(id(layer)) for layer in layers]


def unmerge(model: nn.Module) -> nn.Module:
    """Put the base weights back."""
    for _, layer in spectral_layers(model):
        layer.unmerge()
    return model


def keep_merged(model: nn.Module, keep: bool = True) -> nn.Module:
    """Keep a merged copy of every adapted weight between calls (see `SpectralLinear.keep_merged`).

    The copies of a device, and those in 16 bits, are compared with the coefficients all at once, as the
    model's forward begins. Inside it, coefficients are taken to be those that it began with.

    On a GPU, in 16 bits, a layer's output may be columns of a wider matrix: it is then not contiguous, and
    code that calls `view` across its rows has to call `reshape`. docs/gpu.md says what else is done there.
    """
    for _, layer in spectral_layers(model):
        layer.keep_merged(keep)
    inner = unwrap(model)
    if isinstance(inner, SpectralLayer):  # which compares for itself
        return model
    (together.install if keep else together.remove)(inner)
    return model


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
        from fastspec.nn.conv1d import SpectralConv1D

        cls = SpectralConv1D
    layer = cls.adopt(
        target.module,
        directions=target.directions,
        core=config.core,
        half_width=config.half_width,
        path=config.path,
        train_bias=config.train_bias,
        factors=factors,
    )
    hook = layer.__dict__.pop("_hf_hook", None)
    if (
        hook is not None
    ):  # accelerate's: its forward on the instance would go on calling the plain layer
        from accelerate.hooks import add_hook_to_module

        del layer.__dict__["forward"], layer.__dict__["_old_forward"]
        add_hook_to_module(layer, hook)
    return layer
