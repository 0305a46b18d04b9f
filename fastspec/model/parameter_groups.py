"""Parameter groups for an optimiser: coefficients, heads and the rest learn at rates of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from fastspec.model.convert import adaptation, adapted_part
from fastspec.model.rates import HEAD, default_rate, warn_of_low_rate
from fastspec.model.targets import unwrap

PEFT_DELTA = ".fastspec_delta."  # in the names of coefficients under PEFT, before the adapter's
PEFT_HEAD = ".modules_to_save."  # in those of the modules that PEFT trains whole


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    *,
    head_lr: float | None = None,
    bias_lr: float | None = None,
    coefficient_decay: float = 0.0,
    weight_decay: float = 0.0,
    heads: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in the fewest groups an optimiser needs.

    `torch.optim.AdamW(parameter_groups(model), fused=True)` then updates each group by one fused call.
    Coefficients want a rate that is ten to a hundred times that of a head: a unit step of one moves a
    whole direction of the weight.

    Args:
        model: a spectralized model, a PEFT model with an adapter of `fastspec.peft`, or any other with `lr`
            and `heads` given. Call this before DDP and after `fully_shard`, which replaces the parameters.
        lr: learning rate of the coefficients; None takes `default_rate(model)`, and one that is more than
            ten times below that is warned of, once a model.
        head_lr: of the modules trained whole; None takes 1e-3 where `lr` is None, and else `lr`.
        bias_lr: of everything else that is trainable (biases, LayerNorm); None takes `head_lr`.
        coefficient_decay: weight decay of the coefficients: towards the pretrained spectrum.
        weight_decay: of matrices outside the coefficients; vectors there never decay.
        heads: names of the modules trained whole; None takes those `spectralize` or PEFT noted.

    Returns:
        Groups with "name" ("coefficients", "head" or "extra"), "lr", "weight_decay" and "params", in
        the order of the model's parameters.

    Raises:
        ValueError: nothing is trainable, or no heads are given and the model has no spectral adapter.
    """
    model = unwrap(model)
    if heads is None:
        adapted = adaptation(model)
        if adapted is None and not any(PEFT_DELTA in name for name, _ in model.named_parameters()):
            inner = adapted_part(model)
            hint = "" if inner is None else f" (its part {inner!r} has one: pass model.{inner})"
            raise ValueError(
                f"the model has no spectral adapter{hint}: call fastspec.spectralize(model, config) first, "
                "or name the heads"
            )
        heads = () if adapted is None else adapted.modules_to_save
    heads = list(heads)
    given = lr
    lr = default_rate(model) if lr is None else lr
    if head_lr is None:
        head_lr = HEAD if given is None else lr
    rates = {"coefficients": lr, "head": head_lr, "extra": head_lr if bias_lr is None else bias_lr}
    groups: dict[tuple[str, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = parameter_kind(name, heads)
        outside = weight_decay if parameter.ndim > 1 else 0.0
        decay = coefficient_decay if kind == "coefficients" else outside
        groups.setdefault((kind, decay), []).append(parameter)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient: nothing to optimise")
    made = [
        {"name": kind, "lr": rates[kind], "weight_decay": decay, "params": params}
        for (kind, decay), params in groups.items()
    ]
    if given is not None:
        warn_of_low_rate(model, made)
    return made


def parameter_kind(name: str, heads: Iterable[str]) -> str:
    """ "head", "coefficients" or "extra", by a parameter's full name; PEFT's wrapping is seen through."""
    if PEFT_HEAD in name:
        return "head"
    if name.startswith("task_tables."):  # of many tasks, trained together
        name = name.removeprefix("task_tables.").replace("-", ".")
    if any(re.match(rf"(base_model\.model\.)?{re.escape(h)}\.", name) for h in heads):
        return "head"
    return "coefficients" if name.endswith(".delta") or PEFT_DELTA in name else "extra"
