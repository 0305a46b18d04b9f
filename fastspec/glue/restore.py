"""Weights other than the pretrained ones: of finished runs, of untrained models, as a basis."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastspec.factors import factorize
from fastspec.glue import methods
from fastspec.glue import model as models
from fastspec.glue.config import GRADIENT, RANDOM_MODEL, GlueConfig
from fastspec.glue.record import read_result
from fastspec.glue.tasks import TASKS
from fastspec.nn import SpectralLayer
from fastspec.targets import spectral_layers

if TYPE_CHECKING:
    from fastspec.glue.train import Built


def untrained(model: nn.Module) -> nn.Module:
    """A model of the same class and configuration with the initial weights of its own kind, drawn from
    torch's global generator."""
    return type(model)(model.config)  # type: ignore[call-arg]


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model that computes what `model` does, whatever method adapted it.

    Args:
        model: a plain, a spectralized or a PEFT model; the last is merged in place.
    """
    merge_peft: Any = getattr(model, "merge_and_unload", None)
    if merge_peft is not None:
        model = merge_peft()
    state = {n: t.detach() for n, t in model.state_dict().items() if not n.endswith(".delta")}
    for name, layer in spectral_layers(model):
        state[f"{name}.weight"] = layer.effective_weight()
    return state


def finished(folder: str | os.PathLike[str]) -> Built:
    """The model of the finished run in `folder`, as it was after the last epoch; its rows are not read.

    Raises:
        FileNotFoundError, ValueError: no finished run is there, its adapter is damaged, or the
            pretrained model has changed.
    """
    from fastspec.glue.train import ADAPTER

    built = _built(folder)
    methods.restore(built.model, built.config, Path(folder) / ADAPTER)
    return built


def merged(folder: str | os.PathLike[str]) -> Built:
    """`finished`, as a plain model whose weights hold what the run trained."""
    built = _built(folder, method="head", basis_model=None)
    built.model.load_state_dict(effective_weights(finished(folder).model))
    return built


def starting_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights that the run in `folder` began with: the pretrained ones, or its random ones."""
    return effective_weights(_built(folder, method="head", basis_model=None).model)


def _built(folder: str | os.PathLike[str], **changes: Any) -> Built:
    from fastspec.glue.train import build

    result = read_result(folder)
    config = dataclasses.replace(GlueConfig.from_dict(result["config"]), **changes)
    models.go_offline_if(Path(models.resolve(config.model)).is_dir())
    built = build(config, TASKS[result["data"]["task"]])
    if built.fingerprint != result["model"]["fingerprint"]:
        raise ValueError(f"{folder} was made from another model than {built.name} is now")
    if config.basis_model == GRADIENT:
        from fastspec.glue import gradient_basis

        gradient_basis.load(built.model, Path(folder))
    return built


def basis_weights(config: GlueConfig, model: nn.Module) -> dict[str, Tensor]:
    """The weights that `config.basis_model` means: of an untrained model, or of a run's folder.

    The untrained model is drawn from the run's seed, past the state of the global generator.
    """
    assert config.basis_model is not None
    with torch.random.fork_rng(devices=[]):
        if config.basis_model == RANDOM_MODEL:
            torch.manual_seed(config.seed)
            return effective_weights(untrained(model))
        return effective_weights(finished(config.basis_model).model)


def use_basis_of(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give every adapted layer the singular vectors of the weight of its name in `weights`.

    The layers must have been adapted with basis="random": their s_i = u_i^T W v_i are no singular values,
    so no identity that rests on these is used.

    Raises:
        ValueError: a weight is missing or of another shape.
    """
    layers = list(spectral_layers(model))
    for name, layer in layers:
        given = weights.get(f"{name}.weight")
        if given is None or given.shape != layer.weight.shape:
            raise ValueError(
                f"the basis model has no weight {name}.weight of shape {list(layer.weight.shape)} "
                f"(found: {None if given is None else list(given.shape)})"
            )
    factors = factorize(
        [layer._matrix(weights[f"{name}.weight"]) for name, layer in layers],
        [dataclasses.replace(layer.directions, basis="svd") for _, layer in layers],
        [name for name, _ in layers],
    )
    for (_, layer), found in zip(layers, factors, strict=True):
        set_basis(layer, found.u, found.vh)


def set_basis(layer: SpectralLayer, u: Tensor, vh: Tensor) -> None:
    """Give an adapted layer other vectors, u [out, k] and vh [k, in]."""
    w = layer._matrix(layer.weight.detach())
    layer.u.copy_(u)
    layer.vh.copy_(vh)
    layer.s.copy_(torch.einsum("ok,oi,ki->k", layer.u.to(w), w, layer.vh.to(w)))
