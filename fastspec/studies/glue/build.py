"""The model of a run, as it begins and, of a finished run, as it ended."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.model.targets import spectral_layers
from fastspec.studies import encoders
from fastspec.studies.glue import data, donor_basis, methods
from fastspec.studies.glue.config import GRADIENT, RANDOM_MODEL, GlueConfig
from fastspec.studies.glue.data import Source
from fastspec.studies.glue.result import ADAPTER, read_result
from fastspec.studies.glue.tasks import TASKS, Task


@dataclasses.dataclass
class Built:
    """A model to which a method was applied, and what it was made from."""

    config: GlueConfig
    model: nn.Module
    tokenizer: Any
    heads: list[str]
    name: str
    fingerprint: str


@dataclasses.dataclass
class Prepared(Built):
    """A model ready to train, and its rows."""

    source: Source


def build(config: GlueConfig, task: Task) -> Built:
    """Load the model with a head for `task` drawn from the seed, and apply the method."""
    name = encoders.resolve(config.model)
    with encoders.quiet():
        from transformers import set_seed

        set_seed(config.seed)
        tokenizer = encoders.load_tokenizer(name)
        model = encoders.load_classifier(name, task)
        if config.start == "random":
            model = untrained(model)
        fingerprint = encoders.body_fingerprint(model)
        heads = methods.head_modules(model, config.train_pooler)
        model = methods.apply(model, config)
        if config.basis_model not in (None, GRADIENT):
            donor_basis.use_vectors_of(model, basis_weights(config, model))
    return Built(config, model, tokenizer, heads, name, fingerprint)


def prepare(config: GlueConfig) -> Prepared:
    """Find the rows and build the model for them."""
    task = TASKS[config.task]
    local = Path(encoders.resolve(config.model)).is_dir() and data.is_local(task, config.data)
    encoders.go_offline_if(local)
    source = data.load(task, config.data)
    if config.labels == "random":
        source.train = source.train.permuted(config.seed)
    built = build(config, source.task)
    return Prepared(**vars(built), source=source)


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
    result = read_result(folder)
    config = dataclasses.replace(GlueConfig.from_dict(result["config"]), **changes)
    encoders.go_offline_if(Path(encoders.resolve(config.model)).is_dir())
    built = build(config, TASKS[result["data"]["task"]])
    if built.fingerprint != result["model"]["fingerprint"]:
        raise ValueError(f"{folder} was made from another model than {built.name} is now")
    if config.basis_model == GRADIENT:
        donor_basis.load(built.model, Path(folder))
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
