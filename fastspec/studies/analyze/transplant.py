"""What a finetuned model owes to its singular vectors: swap them, or drop some, and score it.

The finetuned coefficients s_i stay. A swap puts s_i p_i q_i^T in place of s_i u_i v_i^T for the leading
k triplets, where (p_i, q_i) are vectors of the pretrained model, of another task's model or random
orthonormal ones; the zero control only takes the triplets out. A product p_i q_i^T has no sign of its own.

Where singular values lie close together matched vectors differ by a rotation that means nothing, and a
swap of vectors breaks the matrix for no deeper reason. A swap of spans does not: it puts P C Q^T in the
place of M = U_k S_k V_k^T, where C = P^T M Q are the coefficients of M in the other basis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastspec.studies.analyze.alignment import decompose
from fastspec.studies.analyze.weights import pairs
from fastspec.svd.topk import TopkSVD

MASKED = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
SWAPPED = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
KINDS = ("attention", "mlp")
RANDOM, ZERO, PRETRAINED, OTHER = "random", "zero", "pretrained", "other task"


@dataclasses.dataclass(frozen=True)
class Scored:
    """The score of one changed model.

    Args:
        what: the source of the vectors, or the end that was masked.
        share: of the triplets of every matrix that were changed, in [0, 1].
        score: in points.
    """

    what: str
    share: float
    score: float


class Matrices:
    """The adapted matrices of a model with their singular triplets.

    Args:
        model: a plain model, which is changed in place and restored.
        kinds: "attention", "mlp", "other": which matrices are taken.
    """

    def __init__(self, model: nn.Module, kinds: Sequence[str] = KINDS) -> None:
        state = {name: t.clone() for name, t in model.state_dict().items()}
        self.found = [p for p in pairs(state, state) if p.kind in kinds]
        if not self.found:
            raise ValueError(f"the model has no matrix of the kinds {', '.join(kinds)}")
        self.parameters: list[Tensor] = [model.get_parameter(p.name).data for p in self.found]
        self.svds = decompose([p.before for p in self.found])

    def vectors_in(self, weights: Mapping[str, Tensor]) -> list[TopkSVD]:
        """The singular triplets of the matrices of these names in other weights."""
        own = {p.name: p.before for p in self.found}
        return decompose([p.after for p in pairs(own, weights)])

    def random(self, seed: int) -> list[TopkSVD]:
        """Random orthonormal vectors in place of every matrix's own, the values being kept."""
        g = torch.Generator().manual_seed(seed)
        return [
            dataclasses.replace(
                svd, u=_orthonormal(svd.u.shape, g), vh=_orthonormal(svd.vh.mT.shape, g).mT
            )
            for svd in self.svds
        ]

    def restore(self) -> None:
        for parameter, pair in zip(self.parameters, self.found, strict=True):
            parameter.copy_(pair.before.view_as(parameter))

    def replace(
        self,
        vectors: Sequence[TopkSVD] | None,
        start: float,
        stop: float,
        spans: bool = False,
    ) -> None:
        """Put other vectors, or their spans, in the place of the triplets in a range of shares; None
        takes them out."""
        for i, (parameter, pair, own) in enumerate(
            zip(self.parameters, self.found, self.svds, strict=True)
        ):
            k = len(own.s)
            part = slice(round(start * k), round(stop * k))
            taken = (own.u[:, part] * own.s[part]) @ own.vh[part]
            new = pair.before - taken
            if vectors is not None:
                u, vh = vectors[i].u[:, part], vectors[i].vh[part]
                core = u.mT @ taken @ vh.mT if spans else own.s[part].diag()
                new += u @ core @ vh
            parameter.copy_(new.view_as(parameter))


def swap(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    sources: Mapping[str, Mapping[str, Tensor]],
    *,
    shares: Sequence[float] = SWAPPED,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
) -> Iterator[Scored]:
    """Scores with the vectors and with the spans of `sources` (weights by name) in place of the leading
    shares of the model's own, and with the random and zero controls; the first is the model's own score,
    at share 0."""
    matrices = Matrices(model, kinds)
    yield Scored("own", 0.0, score(model))
    vectors: dict[str, list[TopkSVD] | None] = {
        name: matrices.vectors_in(weights) for name, weights in sources.items()
    }
    vectors[RANDOM] = matrices.random(seed)
    vectors[ZERO] = None
    for name, found in vectors.items():
        for spans in (False, True) if found is not None else (False,):
            what = f"{name} spans" if spans else name
            for share in shares:
                value = _scored(matrices, model, score, found, 0.0, share, spans)
                yield Scored(what, share, value)


def mask(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    *,
    shares: Sequence[float] = MASKED,
    kinds: Sequence[str] = KINDS,
) -> Iterator[Scored]:
    """Scores without the leading and without the trailing shares of the triplets of every matrix."""
    matrices = Matrices(model, kinds)
    yield Scored("own", 0.0, score(model))
    for share in shares:
        yield Scored("leading", share, _scored(matrices, model, score, None, 0.0, share))
        yield Scored("trailing", share, _scored(matrices, model, score, None, 1 - share, 1.0))


def _scored(
    matrices: Matrices,
    model: nn.Module,
    score: Callable[[nn.Module], float],
    vectors: Sequence[TopkSVD] | None,
    start: float,
    stop: float,
    spans: bool = False,
) -> float:
    try:
        matrices.replace(vectors, start, stop, spans)
        return score(model)
    finally:
        matrices.restore()


def _orthonormal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, generator=generator))[0]
