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

from fastspec.studies.analyze.alignment import align
from fastspec.studies.analyze.weights import pairs

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


def run(study: Study, announce: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """One row for every size and seed: images, seed, pretraining loss, cosines, accuracy.

    "matched cosine" is of the leading tenth of singular vectors before and after post-training,
    "subspace cosine" of the spans they have together, "random spans" what the latter is by chance; means
    over the encoder's matrices.

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
            autoencoder = Autoencoder(tuple(images.shape[1:]), study.width, study.layers)
            loss = pretrain(autoencoder, images[rest[:size]], study, seed) if size else ""
            encoder = autoencoder.encoder
            before = {n: t.clone() for n, t in encoder.state_dict().items()}
            classifier = Classifier(encoder, int(labels.max()) + 1)
            posttrain(classifier, images[labelled], labels[labelled], study, seed)
            found = align(pairs(before, encoder.state_dict()))
            lines = [a.summary() for a in found]
            row = {
                "images": size,
                "seed": seed,
                "pretraining loss": loss,
                "matched cosine": _mean(line["cosine, leading tenth"] for line in lines),
                "subspace cosine": _mean(line["subspace, leading tenth"] for line in lines),
                "random spans": _mean(float(a.blocks[0, 2]) for a in found),
                "norm of dW over W": _mean(line["norm of dW over W"] for line in lines),
                "accuracy": accuracy(classifier, images[test], labels[test]),
            }
            announce(
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


class Encoder(nn.Module):
    """A small vision transformer over any subset of an image's patches.

    Args:
        shape: channels, height and width of the images; a patch is a quarter of the side.
        width, layers: of the transformer.
    """

    def __init__(self, shape: tuple[int, ...], width: int, layers: int) -> None:
        super().__init__()
        self.patch = shape[-1] // 4
        self.embed = nn.Linear(shape[0] * self.patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = _transformer(width, layers)
        self.norm = nn.LayerNorm(width)

    def patches(self, images: Tensor) -> Tensor:  # [N, c, h, w] -> [N, 16, c patch^2]
        return F.unfold(images, self.patch, stride=self.patch).mT

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        """Hidden states [N, p, width] of patches [N, p, ...] at `places` [N, p]."""
        return self.norm(self.layers(self.embed(patches) + self.position[places]))


class Autoencoder(nn.Module):
    """An encoder that sees part of the patches, and a decoder of one layer that paints the others."""

    SEEN = 6  # of 16

    def __init__(self, shape: tuple[int, ...], width: int, layers: int) -> None:
        super().__init__()
        self.encoder = Encoder(shape, width, layers)
        self.mask = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.decoder = _transformer(width, 1)
        self.paint = nn.Linear(width, self.encoder.embed.in_features)

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the patches that the encoder does not see."""
        patches = self.encoder.patches(images)
        order = torch.rand(patches.shape[:2], generator=generator).argsort(1)
        seen, hidden = order[:, : self.SEEN], order[:, self.SEEN :]
        states = self.encoder(_take(patches, seen), seen)
        blanks = self.mask.expand(*hidden.shape, -1)
        states = torch.cat([states, blanks], 1) + self.position[order]
        painted = self.paint(self.decoder(states)[:, self.SEEN :])
        return F.mse_loss(painted, _take(patches, hidden))


class Classifier(nn.Module):
    """An encoder that sees every patch, the mean over them, and a linear head."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.norm.normalized_shape[0], classes)

    def forward(self, images: Tensor) -> Tensor:
        places = torch.arange(16).expand(len(images), -1)
        return self.head(self.encoder(self.encoder.patches(images), places).mean(1))


def _transformer(width: int, layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def _take(patches: Tensor, places: Tensor) -> Tensor:
    return patches.gather(1, places[..., None].expand(-1, -1, patches.shape[-1]))


def pretrain(model: Autoencoder, images: Tensor, study: Study, seed: int) -> float:
    """Masked reconstruction; returns the mean loss of the last tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    losses = _train(
        model,
        lambda rows: model(images[rows], generator),
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
