"""The stacks that top-k SVD is timed on, each with a float64-checked residual, and its peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import models
import torch
from torch import Tensor

from fastspec import topk_svd


def slow_decay(count: int, m: int, n: int) -> Tensor:
    """A stack of matrices with s_i = (1 + i / 30)^-0.7, which is how spectra of transformers fall."""
    return torch.stack([models.decaying(m, n, seed) for seed in range(count)])


def minilm(shape: tuple[int, int], count: int) -> Tensor:
    """The first `count` linear weights [out, in] of that shape in the real MiniLM-L6."""
    found = [
        m.weight.detach()
        for m in models.build("minilm").base_model.encoder.modules()
        if isinstance(m, torch.nn.Linear) and tuple(m.weight.shape) == shape
    ]
    return torch.stack(found[:count])


@dataclasses.dataclass(frozen=True)
class Stack:
    """One problem: how to build it, and how many times faster than torch.linalg.svd it has to be."""

    build: Callable[[], Tensor]
    k: int
    bar: float


STACKS = {
    "MiniLM 24x384x384": Stack(lambda: minilm((384, 384), 24), 32, 2.5),
    "MiniLM 6x1536x384": Stack(lambda: minilm((1536, 384), 6), 32, 5),
    "MiniLM 6x384x1536": Stack(lambda: minilm((384, 1536), 6), 32, 5),
    "slow decay 12x768x768": Stack(lambda: slow_decay(12, 768, 768), 32, 5),
    "slow decay 6x3072x768": Stack(lambda: slow_decay(6, 3072, 768), 32, 5),
}


def triplets_of_topk(w: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    found = topk_svd(w, k, progress=False)
    return found.u, found.s, found.vh


def triplets_of_lowrank(niter: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]:
    def run(w: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = torch.svd_lowrank(w, k, niter=niter)
        return u, s, v.mT

    return run


def triplets_of_svd(w: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[..., :k], s[..., :k], vh[..., :k, :]


PEERS = {
    "torch.linalg.svd": triplets_of_svd,
    "svd_lowrank niter=2": triplets_of_lowrank(2),
    "svd_lowrank niter=4": triplets_of_lowrank(4),
    "svd_lowrank niter=10": triplets_of_lowrank(10),
}


def residual(w: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """Largest of |W v - s u| / s and |W^T u - s v| / s over the stack, in float64."""
    w, u, s, vh = w.double(), u.double(), s.double(), vh.double()
    forward = (w @ vh.mT - u * s[:, None, :]).norm(dim=1)
    backward = (w.mT @ u - vh.mT * s[:, None, :]).norm(dim=1)
    return float((torch.maximum(forward, backward) / s).max())
