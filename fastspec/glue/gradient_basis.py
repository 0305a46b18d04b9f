"""A basis made for the task: the singular vectors of its gradient, on a few batches before training.

LoRA-SB (arXiv 2411.19557) freezes those of the first gradient around the core of LoRA-XS. Unlike the
pretrained basis they are no property of the base model: a run keeps them beside its adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastspec.files import write_atomically
from fastspec.glue import restore
from fastspec.glue.evaluate import labelled_batches
from fastspec.targets import spectral_layers

if TYPE_CHECKING:
    from fastspec.glue.train import Prepared

FILE = "basis.safetensors"
ROWS = 1024


def use(prepared: Prepared, folder: Path) -> None:
    """Give the layers the gradient's basis: the one in `folder`, or else a new one, which is kept there."""
    if not (folder / FILE).exists():
        sums = summed_gradients(prepared.model, _batches(prepared))
        restore.use_basis_of(prepared.model, sums)
        tensors = {
            f"{name}.{side}": getattr(layer, side).contiguous()
            for name, layer in spectral_layers(prepared.model)
            for side in ("u", "vh")
        }
        write_atomically(folder / FILE, save(tensors))
    load(prepared.model, folder)


def load(model: nn.Module, folder: Path) -> None:
    """Give the layers the basis that `use` kept in `folder`."""
    tensors = load_file(folder / FILE)
    for name, layer in spectral_layers(model):
        restore.set_basis(layer, tensors[f"{name}.u"], tensors[f"{name}.vh"])


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


def _batches(prepared: Prepared) -> Iterable[Mapping[str, Tensor]]:
    """Some training rows, in an order drawn from the seed."""
    config = prepared.config
    train = prepared.source.train.head(config.max_train_rows)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))
    for some in order[:ROWS].split(config.batch_size):
        rows = train.take(some.tolist())
        yield from labelled_batches(prepared.tokenizer, rows, config.max_length, config.batch_size)
