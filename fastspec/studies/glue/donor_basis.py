"""Other vectors than the adapted weights' own: another model's, or those of the task's gradient.

LoRA-SB (arXiv 2411.19557) freezes those of the first gradient around the core of LoRA-XS. Unlike the
pretrained basis they are no property of the base model: a run keeps them beside its adapter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastspec.files import write_atomically
from fastspec.model.targets import spectral_layers
from fastspec.nn.layer import SpectralLayer
from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.data import Split
from fastspec.studies.glue.evaluate import labelled_batches
from fastspec.svd.factors import factorize

FILE = "basis.safetensors"
ROWS = 1024


def use_vectors_of(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
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


def use_gradients(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], folder: Path) -> None:
    """Give the layers the gradient's basis: the one in `folder`, or else a new one, which is kept there."""
    if not (folder / FILE).exists():
        use_vectors_of(model, summed_gradients(model, batches))
        tensors = {
            f"{name}.{side}": getattr(layer, side).contiguous()
            for name, layer in spectral_layers(model)
            for side in ("u", "vh")
        }
        write_atomically(folder / FILE, save(tensors))
    load(model, folder)


def load(model: nn.Module, folder: Path) -> None:
    """Give the layers the basis that `use_gradients` kept in `folder`."""
    tensors = load_file(folder / FILE)
    for name, layer in spectral_layers(model):
        set_basis(layer, tensors[f"{name}.u"], tensors[f"{name}.vh"])


def summed_gradients(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The loss's gradient with respect to every adapted layer's weight, summed over batches.

    Args:
        model: an adapted one; without dropout for the time of the call.
        batches: keyword arguments of the model, which returns a loss.
    """
    weights = {f"{name}.weight": layer.weight for name, layer in spectral_layers(model)}
    sums = {name: torch.zeros_like(w) for name, w in weights.items()}
    training = model.training
    model.eval()
    try:
        for w in weights.values():
            w.requires_grad_(True)
        for batch in batches:
            found = torch.autograd.grad(model(**batch).loss, list(weights.values()))
            torch._foreach_add_(list(sums.values()), found)
    finally:
        for w in weights.values():
            w.requires_grad_(False)
        model.train(training)
    return sums


def first_batches(
    tokenizer: Any, train: Split, config: GlueConfig
) -> Iterable[Mapping[str, Tensor]]:
    """The first `ROWS` training rows in an order drawn from the seed."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))
    for some in order[:ROWS].split(config.batch_size):
        rows = train.take(some.tolist())
        yield from labelled_batches(tokenizer, rows, config.max_length, config.batch_size)
