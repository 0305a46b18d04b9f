"""What of a model a PEFT config means: its layers, and the heads that are trained whole."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from peft import NoMatchingPeftModuleError
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from fastspec.model.targets import check_layer, unsaved_heads
from fastspec.peft.config import ALL_LINEAR, SpectralConfig
from fastspec.peft.layer import SpectralLinear

# the modules to save that PEFT's model classes add themselves, where the model has them
CLASSIFIERS = ("classifier", "score")
ANSWERS = ("qa_outputs",)
USUAL_HEADS = {"SEQ_CLS": CLASSIFIERS, "TOKEN_CLS": CLASSIFIERS, "QUESTION_ANS": ANSWERS}


def resolve_heads(config: SpectralConfig, model: nn.Module) -> None:
    """Enter the heads of the task type into `modules_to_save`, before any layer is matched.

    PEFT's classes know three names of heads, and two of these classes name them after the layers were
    wrapped. Of a new adapter whose config names no other module, all of the model's new modules are heads,
    as for `spectralize`, but those that `target_modules` reaches into by name.
    """
    usual = USUAL_HEADS.get(str(config.task_type), ())
    if not usual:
        return
    given = list(dict.fromkeys(config.modules_to_save or ()))
    heads = given + [name for name in usual if name not in given]
    if set(given) <= set(usual) and config.base_fingerprint is None:
        named = dataclasses.replace(config, modules_to_save=None)
        reached = [] if is_all_linear(config) else [n for n in _names(model) if meant(named, n)]
        heads += [
            head
            for head in unsaved_heads(model, given)
            if not head.endswith(usual)  # as PEFT finds them
            and not any(f"{name}.".startswith(f"{head}.") for name in reached)
        ]
    config.modules_to_save = heads


def is_all_linear(config: SpectralConfig) -> bool:
    targets = config.target_modules
    return targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR)


def resolve_all_linear(config: SpectralConfig, model: nn.Module) -> None:
    """Let `target_modules` name the layers that "all-linear" means, `layers_to_transform` applied.

    Raises:
        NoMatchingPeftModuleError: a layer of `layers_to_transform` has none.
    """
    config.target_modules = ALL_LINEAR
    _maybe_include_all_linear_layers(config, model)  # type: ignore[arg-type]
    found: Any = config.target_modules
    found -= {  # which read its weight without calling it
        f"{name}.out_proj"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    wrapped = tuple(  # the heads of other adapters
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    )
    found = {name for name in found if not name.startswith(wrapped)}
    check_layers(config, found)
    config.target_modules = {name for name in found if picked(config, name)}


def lower_ranks(config: SpectralConfig, model: nn.Module) -> None:
    """Let `rank_pattern` give a layer all it has, where a rank that others serve is above its short side.

    Only for targets that are no list of names: what was asked of a layer by name is refused instead.
    """
    if not isinstance(config.select, str):
        return
    lowered: dict[int, dict[str, int]] = {}
    served = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D, SpectralLinear)) and meant(config, name):
            if is_parametrized(module):  # refused later; to look at the weight may move its state
                continue
            side = min(module.weight.shape)
            rank = config.rank_of(name, side)
            if rank <= side:
                served.add(rank)
            else:
                lowered.setdefault(rank, {})[re.escape(name)] = side
    for rank, sides in lowered.items():
        if rank in served:  # the first that fits is taken
            config.rank_pattern = {**sides, **config.rank_pattern}


def meant(config: SpectralConfig, name: str) -> Any:
    """Whether the config targets a module: PEFT's answer, but that

    - full names obey `layers_to_transform` too, and
    - nothing is targeted of what PEFT takes for a module to save: it goes by the ends of names for these,
      so `"classifier"` means DistilBERT's `pre_classifier` as well.
    """
    in_any_layer = SimpleNamespace(**vars(config) | {"layers_to_transform": None})
    found = check_target_module_exists(in_any_layer, name)
    if found and any(re.search(rf"{m}(\.|$)", name) for m in config.modules_to_save or ()):
        return False
    return found and (found if picked(config, name) else False)


def picked(config: SpectralConfig, name: str, layers: Any = None) -> bool:
    """Whether the module `name` is in one of `layers`, by default those of `layers_to_transform`.

    As in PEFT its layer is the first number in its name, or the first after one of `layers_pattern`.
    """
    layers = config.layers_to_transform if layers is None else layers
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern or r"[^.]+"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.search(rf"(?:^|\.){pattern}\.(\d+)\.", name)
        if found is not None:
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def check_layers(config: SpectralConfig, targets: Iterable[str]) -> None:
    """Refuse an index of `layers_to_transform` that none of the targets is in."""
    layers = config.layers_to_transform
    if layers is None:
        return
    targets = sorted(targets)
    for index in [layers] if isinstance(layers, int) else layers:
        if not any(picked(config, name, [index]) for name in targets):
            raise NoMatchingPeftModuleError(
                f"layers_to_transform={layers!r} with layers_pattern={config.layers_pattern!r}: none of the "
                f"targets is in a layer {index}: {_listed(targets)}"
            )


def check_names(config: SpectralConfig, model: nn.Module) -> None:
    """Refuse what the config names and the model has not: PEFT passes over it if anything else matches.

    Raises:
        NoMatchingPeftModuleError: an entry of `target_modules`, `exclude_modules` or `modules_to_save` is
            the end of no module's name, or no target is in a layer of `layers_to_transform`.
    """
    names = _names(model)
    linear = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    linear = [name.removesuffix(".base_layer") for name in linear]
    for entry in _entries(config.target_modules):
        _check_experts(entry, any(map(_has_end(entry), names)), model)
        if not any(map(_has_end(entry), names)):
            raise NoMatchingPeftModuleError(
                f"target_modules names {entry!r}, which was not found in the base model; its linear layers "
                f"are {_listed(linear)}"
            )
    for entry in _entries(config.exclude_modules):
        found = list(filter(_has_end(entry), names))
        inside = [name for name in linear if f".{entry}." in f".{name}"]
        if not found or (inside and not set(found) & set(linear)):
            hint = f"; name what is inside it: {_listed(inside)}" if inside else ""
            raise NoMatchingPeftModuleError(
                f"exclude_modules names {entry!r}, which is no layer of the base model{hint}"
            )
    for entry in set(config.modules_to_save or ()) - {*CLASSIFIERS, *ANSWERS}:
        if not any(name.endswith(entry) for name in names):
            raise NoMatchingPeftModuleError(
                f"modules_to_save names {entry!r}, which was not found in the base model"
            )
    if _entries(config.target_modules):
        everywhere = dataclasses.replace(config, layers_to_transform=None, layers_pattern=None)
        check_layers(config, [name for name in names if meant(everywhere, name)])


def _check_experts(entry: str, found: bool, model: nn.Module) -> None:
    """Speak of experts held as one 3-D parameter that `entry` is part of (gate_proj of gate_up_proj)."""
    words = set(entry.rpartition(".")[2].split("_"))
    stacks = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and words <= set(name.rpartition(".")[2].split("_"))
    ]
    if not stacks:
        return
    held = (
        f"{_listed(stacks, 2)} are experts held as one 3-D parameter, which is no linear layer and which "
        "this method can't adapt through PEFT"
    )
    if not found:
        raise NoMatchingPeftModuleError(
            f"target_modules names {entry!r}, which was not found in the base model as a module: {held}"
        )
    warnings.warn(
        f"target_modules names {entry!r}: the linear layers of that name are adapted, but {held}",
        stacklevel=4,
    )


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name]


def _entries(names: Any) -> list[str]:
    """The names of a list or set; none of a regular expression."""
    return [] if names is None or isinstance(names, str) else sorted(names)


def _has_end(entry: str) -> Callable[[str], bool]:
    return lambda name: name == entry or name.endswith(f".{entry}")


def _listed(names: Sequence[str], count: int = 6) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "") if names else "none"


def check_target(name: str, target: nn.Module, parent: nn.Module) -> None:
    """Refuse what the layer can't stand in for."""
    if not isinstance(target, (nn.Linear, Conv1D)):
        raise TypeError(
            f"{name}: {type(target).__name__} is not supported, only nn.Linear and transformers' Conv1D "
            "are: leave it out of target_modules"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{name}: nn.MultiheadAttention reads this layer's weight without calling it, so it can't be "
            "adapted: name it in exclude_modules"
        )
    if isinstance(target._parameters.get("weight"), nn.UninitializedParameter):
        raise ValueError(f"{name}: a lazy layer without weights yet: run the model once first")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(vars(target)[kind] for kind in hooks) or "forward" in vars(target):
        raise ValueError(
            f"{name}: the layer has forward hooks or a forward of its own (offloading, weight norm, or the "
            "user's), or backward hooks, which an adapted layer does not run: remove them, or name it in "
            "exclude_modules"
        )
    check_layer(name, target)
