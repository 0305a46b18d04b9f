"""Does more pretraining data make a more stable basis? A small masked autoencoder on small images.

The same vision transformer is pretrained by masked reconstruction (He et al. 2022, arXiv 2111.06377) on
nested subsets of the images, always for the same number of steps, then post-trained to classify a fixed
labelled set. What is measured is how far the singular vectors move in post-training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastspec.analyze.alignment import align
from fastspec.analyze.weights import pairs

SOURCES = ("digits", "cifar10")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is trained, for how long, on how much.

    Args:
        source: "digits" (scikit-learn's 1,797 images of 8 x 8, doubled to 16 x 16), or "cifar10", which
            `datasets` fetches from the hub.
        sizes: numbers of pretraining images; 0 post-trains from random weights.
        seeds: of weights, order and split.
        pretraining_steps, posttraining_steps, batch_size, rate: of AdamW, the rate falling to 0 as a cosine.
        labelled, test: rows of post-training and of its test; all others may be pretrained on.
        width, layers: of the encoder.
    """

    source: str = "digits"
    sizes: tuple[int, ...] = (0, 30, 100, 300, 1000)
    seeds: tuple[int, ...] = (0, 1, 2)
    pretraining_steps: int = 600
    posttraining_steps: int = 100
    batch_size: int = 64
    rate: float = 1e-3
    labelled: int = 200
    test: int = 500
    width: int = 64
    layers: int = 4

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")


def run(study: Study, report: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """One row for every size and seed: images, seed, pretraining loss, cosines, accuracy.

    "matched cosine" is of the leading tenth of singular vectors before and after post-training,
    "subspace cosine" of the spans they have together, means over the encoder's matrices.

    Raises:
        ValueError: a size is above the number of images left for pretraining.
    """
    images, labels = load_images(study.source)
    pool = len(images) - study.labelled - study.test
    if max(study.sizes) > pool:
        raise ValueError(
            f"{study.source} leaves {pool} images for pretraining, got {max(study.sizes)}"
        )
    for seed in study.seeds:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        test, labelled, rest = order.split([study.test, study.labelled, pool])
        for size in study.sizes:
            torch.manual_seed(seed)
            autoencoder = build(study, images)
            loss = pretrain(autoencoder, images[rest[:size]], study, seed) if size else float("nan")
            encoder = autoencoder.vit
            before = {n: t.clone() for n, t in encoder.state_dict().items()}
            classifier = Classifier(encoder, int(labels.max()) + 1)
            posttrain(classifier, images[labelled], labels[labelled], study, seed)
            lines = [a.summary() for a in align(pairs(before, encoder.state_dict()))]
            row = {
                "images": size,
                "seed": seed,
                "pretraining loss": loss,
                "matched cosine": _mean(line["cosine, leading tenth"] for line in lines),
                "subspace cosine": _mean(line["subspace, leading tenth"] for line in lines),
                "|dW|/|W|": _mean(line["|dW|/|W|"] for line in lines),
                "accuracy": accuracy(classifier, images[test], labels[test]),
            }
            report(
                ", ".join(
                    f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                )
            )
            yield row


def load_images(source: str) -> tuple[Tensor, Tensor]:
    """Images [N, channels, height, width] of zero mean and unit variance, and class numbers [N]."""
    if source == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32)[:, None]
        images = F.interpolate(images, scale_factor=2, mode="bilinear")
        labels = torch.tensor(found.target, dtype=torch.long)
    else:
        from datasets import load_dataset

        rows = load_dataset("uoft-cs/cifar10", split="train").with_format("torch")
        images = torch.stack(list(rows["img"])).float()
        labels = torch.as_tensor(rows["label"][:])
    return (images - images.mean()) / images.std(), labels


def build(study: Study, images: Tensor) -> Any:
    """A `transformers` ViTMAE for images of this size, with patches of a quarter of their side."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    side = images.shape[-1]
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=side,
            patch_size=side // 4,
            num_channels=images.shape[1],
            hidden_size=study.width,
            num_hidden_layers=study.layers,
            num_attention_heads=4,
            intermediate_size=2 * study.width,
            decoder_hidden_size=study.width // 2,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=study.width,
            mask_ratio=0.6,
        )
    )


class Classifier(nn.Module):
    """A ViTMAE encoder that masks nothing, the mean over its patches, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr, arg-type]

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.encoder(images).last_hidden_state
        return self.head(hidden[:, 1:].mean(1))


def pretrain(model: Any, images: Tensor, study: Study, seed: int) -> float:
    """Masked reconstruction; returns the mean loss of the last tenth of the steps."""
    losses = _train(
        model,
        lambda rows: model(images[rows]).loss,
        len(images),
        study.pretraining_steps,
        study,
        seed,
    )
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def posttrain(
    classifier: Classifier, images: Tensor, labels: Tensor, study: Study, seed: int
) -> None:
    """Full finetuning with cross-entropy."""
    classifier.encoder.config.mask_ratio = 0.0  # type: ignore[union-attr]
    _train(
        classifier,
        lambda rows: F.cross_entropy(classifier(images[rows]), labels[rows]),
        len(images),
        study.posttraining_steps,
        study,
        seed,
    )


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """In per cent."""
    classifier.eval()
    hits = [
        classifier(x).argmax(-1) == y
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return 100 * float(torch.cat(hits).float().mean())


def _train(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    rows: int,
    steps: int,
    study: Study,
    seed: int,
) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=study.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        loss = loss_of(torch.randint(rows, (study.batch_size,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
