"""The problems that top-k SVD is timed on, its peers, and the residual that judges both."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping

import models
import numpy as np
import torch
from torch import Tensor

from fastspec import topk_svd

Triplets = tuple[Tensor, Tensor, Tensor]
SVD, LOWRANK = "torch.linalg.svd", "svd_lowrank niter=4"


def slow_decay(count: int, m: int, n: int, device: str | torch.device = "cpu") -> list[Tensor]:
    """A stack of matrices with s_i = (1 + i / 30)^-0.7, which is how spectra of transformers fall."""
    first = models.decaying(m, n, device=device)
    # the others have its vectors in another order, times signs: as hard, and no two QR factorisations each
    g = torch.Generator().manual_seed(0)
    stack = [first]
    for _ in range(count - 1):
        rows, signs = torch.randperm(m, generator=g), torch.randint(0, 2, (n,), generator=g)
        stack.append(first[rows.to(device)] * (2 * signs - 1).to(device))
    return [torch.stack(stack)]


def gaussian(m: int, n: int) -> list[Tensor]:
    return [torch.randn(1, m, n, generator=torch.Generator().manual_seed(0))]


def minilm() -> list[Tensor]:
    """Every linear weight [out, in] of the real MiniLM-L6, a stack for each of its three shapes."""
    stacks: dict[tuple[int, ...], list[Tensor]] = {}
    for module in models.build("minilm").base_model.encoder.modules():
        if isinstance(module, torch.nn.Linear):
            stacks.setdefault(tuple(module.weight.shape), []).append(module.weight.detach())
    return [torch.stack(weights) for weights in stacks.values()]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Stacks factorised one after the other, and what is asked of `topk_svd` on them.

    Attributes:
        build: makes the stacks [L, m, n].
        ranks: triplets wanted, each a measurement.
        faster: peer to how many times as fast as it we have to be.
        beats: we have to be faster than every peer whose residual is at most this.
        tol: residual asked.
        sample: matrices of a stack that peers which loop over it are timed on.
    """

    build: Callable[[], list[Tensor]]
    ranks: tuple[int, ...]
    faster: Mapping[str, float] = dataclasses.field(default_factory=dict)
    beats: float = 0.0
    tol: float = 1e-5
    sample: int = 1


PROBLEMS = {
    "MiniLM": Problem(minilm, (32,), {SVD: 4, LOWRANK: 1}, sample=6),
    "48x768x768": Problem(lambda: slow_decay(48, 768, 768), (32, 64), {SVD: 8, LOWRANK: 0.5}),
    "12x3072x768": Problem(lambda: slow_decay(12, 3072, 768), (32, 64), {SVD: 20, LOWRANK: 0.5}),
    "12x768x3072": Problem(lambda: slow_decay(12, 768, 3072), (32, 64), {SVD: 20, LOWRANK: 0.5}),
    "1x4096x4096": Problem(lambda: slow_decay(1, 4096, 4096), (64,), beats=1e-3),
    "1x14336x4096": Problem(lambda: slow_decay(1, 14336, 4096), (64,), beats=1e-3),
    "flat 1x768x768": Problem(lambda: gaussian(768, 768), (32,), beats=1e-4, tol=1e-4),
}


# the shapes of an 8B decoder's layers, and how many matrices of each its 32 blocks have
DECODER_COUNTS = {"4096x4096": 64, "1024x4096": 64, "14336x4096": 64, "4096x14336": 32}


def _alone(name: str) -> Problem:
    m, n = map(int, name.split("x"))
    return Problem(lambda: slow_decay(1, m, n), (64,))


DECODER = {name: _alone(name) for name in DECODER_COUNTS}


def hard(values: Tensor, m: int, n: int) -> Tensor:
    """A random matrix [m, n] with these singular values."""
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(m, len(values), generator=g))[0]
    v = torch.linalg.qr(torch.randn(n, len(values), generator=g))[0]
    return (u * values) @ v.mT


HARD: dict[str, tuple[Callable[[], Tensor], int]] = {
    "clustered values": (lambda: hard(0.8 ** (torch.arange(768) // 40), 768, 768), 64),
    "exact rank deficiency": (lambda: hard(torch.ones(16), 768, 768), 64),
    "k = min(m, n)": (lambda: models.decaying(384, 384), 384),
    "k = 1": (lambda: models.decaying(768, 768), 1),
    "1 x n": (lambda: gaussian(1, 4096)[0][0], 1),
    "tall 30522 x 384": (lambda: models.decaying(30522, 384), 32),
}


def triplets_of_topk(w: Tensor, k: int, tol: float = 1e-5) -> Triplets:
    found = topk_svd(w, k, tol=tol, progress=False)
    return found.u, found.s, found.vh


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another way to leading triplets of a stack; those that `loop` take one matrix at a time."""

    run: Callable[[Tensor, int], Triplets]
    loops: bool = True


def _exact(w: Tensor, k: int) -> Triplets:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[..., :k], s[..., :k], vh[..., :k, :]


def _lowrank(niter: int) -> Peer:
    def run(w: Tensor, k: int) -> Triplets:
        u, s, v = torch.svd_lowrank(w, k, niter=niter)
        return u, s, v.mT

    return Peer(run, loops=False)


def _one_by_one(factorise: Callable[[np.ndarray, int], tuple]) -> Peer:
    def run(w: Tensor, k: int) -> Triplets:
        found = [factorise(matrix.numpy(), k) for matrix in w]
        u, s, vh = (torch.stack([torch.from_numpy(f[i].copy()) for f in found]) for i in range(3))
        return u, s, vh

    return Peer(run)


def _scipy(solver: str) -> Peer:
    def factorise(w: np.ndarray, k: int) -> tuple:
        from scipy.sparse.linalg import svds

        with (
            warnings.catch_warnings()
        ):  # lobpcg says when it stopped short; the residual says it too
            warnings.simplefilter("ignore", UserWarning)
            u, s, vh = svds(w, k, solver=solver, rng=np.random.default_rng(0))
        order = np.argsort(-s)
        return u[:, order], s[order], vh[order]

    return _one_by_one(factorise)


def _sklearn(w: np.ndarray, k: int) -> tuple:
    from sklearn.utils.extmath import randomized_svd

    return randomized_svd(w, k, random_state=0)


def _eigentune(w: Tensor, k: int) -> Triplets:
    from eigentune import EigenTuneConfig
    from eigentune.svd import compute_bases

    config = EigenTuneConfig(rank=k, svd_backend="randomized")
    found = [compute_bases(matrix, config) for matrix in w]
    u, s, vh = (torch.stack([getattr(b, name) for b in found]) for name in ("U", "S", "Vh"))
    return u, s, vh


PEERS = {
    SVD: Peer(_exact),
    "svd_lowrank niter=2": _lowrank(2),
    LOWRANK: _lowrank(4),
    "svd_lowrank niter=10": _lowrank(10),
    "svd_lowrank niter=30": _lowrank(30),
    "scipy svds arpack": _scipy("arpack"),
    "scipy svds propack": _scipy("propack"),
    "scipy svds lobpcg": _scipy("lobpcg"),
    "sklearn randomized_svd": _one_by_one(_sklearn),
    "EigenTune randomized": Peer(_eigentune),
}


def residual(w: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """Largest of |W v - s u| and |W^T u - s v| over max(s, 2^-8 s_1), in float64, over the stack."""
    worst = 0.0
    for w_, u_, s_, vh_ in zip(w, u.double(), s.double(), vh.double(), strict=True):
        wide = w_.double()
        forward = (wide @ vh_.mT - u_ * s_).norm(dim=0)
        backward = (wide.mT @ u_ - vh_.mT * s_).norm(dim=0)
        allowed = torch.maximum(s_, s_[0] * 2**-8)
        worst = max(worst, float((torch.maximum(forward, backward) / allowed).max()))
    return worst
