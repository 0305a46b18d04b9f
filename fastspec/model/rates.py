"""Learning rates of coefficients by core and spectrum, and a warning where one is far too low."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fastspec.model.base import TABLES
from fastspec.model.fsdp import whole
from fastspec.model.targets import spectral_layers, unwrap

# AdamW's step in units of the mean singular value: the rates that MiniLM wants on GLUE (docs/results.md)
# over the mean singular value of what is adapted there; of a low-rank core, half of what a decoder wants
# (docs/decoders.md)
PER_SINGULAR_VALUE: Mapping[str, float] = {
    "diag": 2.2e-2,
    "band": 5e-3,
    "dense": 1.5e-3,
    "low_rank": 1e-3,
}
HEAD = 1e-3  # of heads, biases and normalisation layers
FAR = 10.0  # times below the default is worth a warning


def default_rate(model: nn.Module) -> float:
    """The learning rate that AdamW wants for the coefficients of a model, to about a factor of two.

    One rate for the model, in proportion to the mean singular value of the adapted directions: an AdamW
    step moves every coefficient by about the rate, whatever the gradient, and moving a direction by a
    hundredth of its singular value means the same in any model.

    Args:
        model: spectralized, or a PEFT model or a model of transformers with an adapter of
            `fastspec.peft.SpectralConfig`. What a wrapper holds below it counts too.

    Raises:
        ValueError: nothing in the model has coefficients that are trained.
    """
    found = _rate_of(coefficients(model))
    if found is None:
        raise ValueError(
            "the model has no coefficients to train: call fastspec.spectralize(model, config) or "
            "peft.get_peft_model with fastspec.peft.SpectralConfig first"
        )
    return found


def _rate_of(found: Iterable[tuple[Tensor, str, float]]) -> float | None:
    weighted = count = 0.0
    for delta, core, size in found:
        weighted += delta.numel() * PER_SINGULAR_VALUE[core] * size
        count += delta.numel()
    return float(f"{weighted / count:.1e}") if count else None


def coefficients(model: nn.Module) -> Iterator[tuple[Tensor, str, float]]:
    """(trained tensor, kind of core, mean singular value of its directions), layer by layer."""
    model = unwrap(model)
    parameters = dict(model.named_parameters())
    for name, layer in spectral_layers(model):
        table = parameters.get(TABLES + f"{name}.delta".replace(".", "-"))
        delta = layer.delta if table is None else table  # of many tasks, trained together
        if delta.requires_grad:
            matrix = layer._matrix(layer.weight)
            yield delta, layer.core, _mean_value(layer.s, layer.directions.basis, matrix)
    for bridged in model.modules():
        deltas: Any = getattr(bridged, "fastspec_delta", None)  # a layer of the bridge to PEFT
        for adapter, delta in deltas.items() if deltas is not None else ():
            if delta.requires_grad:
                found: Any = bridged
                s, basis = found.factors(adapter).s, found.fastspec_basis[adapter].directions.basis
                size = _mean_value(s, basis, found.base_matrix())
                yield delta, found.fastspec_form[adapter].core, size


def _mean_value(s: Tensor, basis: str, matrix: Tensor) -> float:
    if basis == "svd":
        return float(whole(s.detach()).float().mean())
    # of a random basis: the root mean square of all singular values
    return float(whole(matrix.detach()).float().norm()) / min(matrix.shape) ** 0.5


def warn_of_low_rate(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Warn once a model where an optimiser's groups would train its coefficients at far too low a rate.

    Args:
        model: as for `default_rate`; one without coefficients is passed over.
        groups: of an optimiser, with "params" and "lr".
    """
    found = list(coefficients(model))
    trained = {id(delta) for delta, _, _ in found}
    # a schedule that warms up has put the first step's rate into "lr"
    rates = [
        float(g.get("initial_lr", g["lr"]))
        for g in groups
        if any(id(p) in trained for p in g["params"])
    ]
    if not rates or getattr(model, "_fastspec_warned_of_rate", False):
        return
    wanted = _rate_of(found)
    if wanted is not None and max(rates) * FAR < wanted:
        model._fastspec_warned_of_rate = True  # type: ignore[assignment]
        warnings.warn(
            f"coefficients would be trained at a learning rate of {max(rates):g}, where this model wants "
            f"about {wanted:g}: they would hardly move. fastspec.parameter_groups(model) has rates "
            "that suit",
            stacklevel=3,
        )
