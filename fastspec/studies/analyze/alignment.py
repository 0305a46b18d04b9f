"""What finetuning did to the singular vectors of a matrix.

Matched cosines compare the i-th singular vectors of two matrices. Where singular values lie close
together the vectors are not determined: any rotation among them is as good, so a matched cosine near 0
says nothing there. What is determined is the space they span together, so every figure here has a
counterpart for spaces: principal angles between the spans of clusters, and between those of rank ranges.

Alphabet: W before, W' after [m, n], d = W' - W, U [m, k], s [k], Vh [k, n], k = min(m, n); left
cosines are of u, right ones of v.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastspec.studies.analyze.weights import Pair
from fastspec.svd.topk import TopkSVD, topk_svd

GAP = 0.01
RANGES = 10


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The singular vectors and values of one matrix before and after, and its update.

    Attributes:
        name, kind, layer, shape: of the matrix.
        s, s_after, s_update: [k] singular values of W, W' and d.
        left, right: [k] |u_i . u'_i| and |v_i . v'_i|.
        joint: [k] (u_i . u'_i)(v_i . v'_i), the cosine of u_i v_i^T and u'_i v'_i^T.
        cluster: [k] number of the cluster of i: consecutive values of W closer than `gap` times the larger.
        cluster_left, cluster_right: [k] root mean square cosine of the principal angles between the spans
            of i's cluster before and after; equal to `left`, `right` in clusters of one.
        overlap_left, overlap_right: [k] mean squared cosine of the principal angles between the leading
            i + 1 vectors before and after.
        blocks: [RANGES, 3] per rank range [a, b): mean of (left + right) / 2; the root mean square
            principal cosine of the spans of the range, left and right averaged; the same for random spans.
        update_captured: [k] |U_r^T d V_r|_F^2 / |d|_F^2 for r = i + 1; 0 where d = 0.
        update_diagonal: [k] u_i^T d v_i, the change of the i-th coefficient to first order.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, int]
    s: Tensor
    s_after: Tensor
    s_update: Tensor
    left: Tensor
    right: Tensor
    joint: Tensor
    cluster: Tensor
    cluster_left: Tensor
    cluster_right: Tensor
    cluster_chance: Tensor
    overlap_left: Tensor
    overlap_right: Tensor
    blocks: Tensor
    update_captured: Tensor
    update_diagonal: Tensor

    def explained(self) -> Tensor:
        """[k] share of |W|_F^2 in the leading i + 1 triplets."""
        energy = self.s.double().square().cumsum(0)
        return energy / energy[-1]

    def summary(self) -> dict[str, Any]:
        """One line of a table."""
        m, n = self.shape
        tenth = max(1, len(self.s) // RANGES)
        return {
            "matrix": self.name.removesuffix(".weight"),
            "kind": self.kind,
            "layer": "" if self.layer is None else self.layer,
            "shape": f"{m} x {n}",
            "cosine, leading tenth": _mean(self.left[:tenth], self.right[:tenth]),
            "cosine, all": _mean(self.left, self.right),
            "subspace, leading tenth": _mean(
                self.overlap_left[tenth - 1].sqrt(), self.overlap_right[tenth - 1].sqrt()
            ),
            "in clusters": float((self.cluster.bincount()[self.cluster] > 1).double().mean()),
            "cluster cosine, all": _mean(self.cluster_left, self.cluster_right),
            "s1(dW)/s1(W)": float(self.s_update[0] / self.s[0]),
            "norm of dW over W": float(self.s_update.norm() / self.s.norm()),
            "norm of ds over s": float((self.s_after - self.s).norm() / self.s.norm()),
            "W in leading tenth": float(self.explained()[tenth - 1]),
            "dW in leading tenth": float(self.update_captured[tenth - 1]),
            "dW there by chance": float(random_block(self.shape)[tenth - 1]),
            "dW in W's span": float(self.update_captured[-1]),
            "dW in it by chance": float(random_block(self.shape)[-1]),
            "dW on the diagonal": self._share_of_update(self.update_diagonal),
            "dW on it by chance": len(self.s) / (m * n),
            "dW in 8 directions of its own": self._share_of_update(self.s_update[:8]),
        }

    def _share_of_update(self, entries: Tensor) -> float:
        """The share of |dW|_F^2 in some of its entries in an orthonormal basis; 0 of no update."""
        whole = self.s_update.double().square().sum()
        return float(entries.double().square().sum() / whole) if whole > 0 else 0.0

    def vectors(self) -> Iterator[dict[str, Any]]:
        """One line a singular vector."""
        columns = {
            "s": self.s,
            "s after": self.s_after,
            "left cosine": self.left,
            "right cosine": self.right,
            "joint cosine": self.joint,
            "cluster": self.cluster,
            "left cosine of the cluster": self.cluster_left,
            "right cosine of the cluster": self.cluster_right,
            "change of the coefficient": self.update_diagonal,
        }
        for i, values in enumerate(zip(*(c.tolist() for c in columns.values()), strict=True)):
            yield {"matrix": self.name.removesuffix(".weight"), "rank": i} | dict(
                zip(columns, values, strict=True)
            )


def align(matrices: Sequence[Pair], gap: float = GAP) -> list[Alignment]:
    """`Alignment` of every pair, all ranks; matrices of one shape are factorised together.

    Args:
        matrices: as from `fastspec.studies.analyze.weights.pairs`.
        gap: neighbours closer than this share of the larger value belong to one cluster.

    Raises:
        ValueError: `gap` is not in [0, 1), or a first matrix is zero.
    """
    if not 0 <= gap < 1:
        raise ValueError(f"gap is a share of a singular value, in [0, 1), got {gap!r}")
    zero = next((p.name for p in matrices if not bool(p.before.any())), None)
    if zero is not None:
        raise ValueError(f"{zero} is zero in the first checkpoint: it has no singular vectors")
    before, after, update = (
        decompose(stack)
        for stack in (
            [p.before for p in matrices],
            [p.after for p in matrices],
            [p.after - p.before for p in matrices],
        )
    )
    return [_align_one(*each, gap) for each in zip(matrices, before, after, update, strict=True)]


def by_kind(alignments: Sequence[Alignment]) -> list[dict[str, Any]]:
    """Means of the summaries over the matrices of a kind: one line a figure, attention, MLP and others
    apart."""
    kinds = [k for k in ("attention", "mlp", "other") if any(a.kind == k for a in alignments)]
    rows = {k: [a.summary() for a in alignments if a.kind == k] for k in kinds}
    figures = [name for name, value in alignments[0].summary().items() if isinstance(value, float)]
    head = "mean over matrices"
    return [
        {head: "matrices"} | {k: len(rows[k]) for k in kinds},
        *(
            {head: name} | {k: sum(r[name] for r in rows[k]) / len(rows[k]) for k in kinds}
            for name in figures
        ),
    ]


def decompose(matrices: Sequence[Tensor]) -> list[TopkSVD]:
    """All singular triplets of every matrix; those of one shape are factorised together."""
    found = topk_svd(list(matrices), [min(m.shape) for m in matrices], progress=False)
    assert isinstance(found, list)
    return found


def _align_one(
    pair: Pair, before: TopkSVD, after: TopkSVD, update: TopkSVD, gap: float
) -> Alignment:
    left = before.u.mT @ after.u  # [k, k]
    right = before.vh @ after.vh.mT
    cluster = clusters(before.s, gap)
    d = before.u.mT @ (pair.after - pair.before) @ before.vh.mT
    whole = update.s.double().square().sum()
    captured = _leading_energy(d.double()) / whole if whole > 0 else torch.zeros(len(d)).double()
    joint = left.diagonal() * right.diagonal()
    return Alignment(
        name=pair.name,
        kind=pair.kind,
        layer=pair.layer,
        shape=(pair.before.shape[0], pair.before.shape[1]),
        s=before.s,
        s_after=after.s,
        s_update=update.s,
        left=left.diagonal().abs(),
        right=right.diagonal().abs(),
        joint=joint,
        cluster=cluster,
        cluster_left=_cluster_cosines(left, cluster),
        cluster_right=_cluster_cosines(right, cluster),
        cluster_chance=_chance(cluster.bincount()[cluster], pair.before.shape),
        overlap_left=_overlap(left),
        overlap_right=_overlap(right),
        blocks=_blocks(left, right, pair.before.shape),
        update_captured=captured,
        update_diagonal=d.diagonal(),
    )


def clusters(s: Tensor, gap: float) -> Tensor:
    """[k] numbers from 0 of the runs of descending values whose neighbours differ by at most `gap` times
    the larger one."""
    apart = s[:-1] - s[1:] > gap * s[:-1]
    return torch.cat([apart.new_zeros(1), apart]).cumsum(0)


def _cluster_cosines(cross: Tensor, cluster: Tensor) -> Tensor:
    """sqrt(|M_CC|_F^2 / |C|) of every index's cluster C: M_CC has the cosines as singular values."""
    same = cluster[:, None] == cluster[None, :]
    rows = (cross.square() * same).sum(1)
    totals = torch.zeros_like(rows).index_add_(0, cluster, rows)[cluster]
    return (totals / cluster.bincount()[cluster]).sqrt()


def _overlap(cross: Tensor) -> Tensor:
    """|M_rr|_F^2 / r for every leading block M_rr of order r."""
    counts = torch.arange(1, len(cross) + 1)
    return _leading_energy(cross.double()) / counts


def _leading_energy(m: Tensor) -> Tensor:
    """|M_rr|_F^2 for every leading block of M [k, k]."""
    return m.square().cumsum(0).cumsum(1).diagonal()


def _blocks(left: Tensor, right: Tensor, shape: Sequence[int]) -> Tensor:
    k = len(left)
    out = []
    for a, b in rank_ranges(k):
        spans = [float(m[a:b, a:b].square().sum() / (b - a)) ** 0.5 for m in (left, right)]
        by_chance = float(_chance(torch.tensor(b - a), shape))
        matched = _mean(left.diagonal()[a:b].abs(), right.diagonal()[a:b].abs())
        out.append([matched, sum(spans) / 2, by_chance])
    return torch.tensor(out)


def random_block(shape: Sequence[int]) -> Tensor:
    """[k] r^2 / (m n), the share of a matrix [m, n] without direction that its r x r blocks hold."""
    m, n = shape
    return torch.arange(1, min(m, n) + 1).double().square() / (m * n)


def _chance(dimension: Tensor, shape: Sequence[int]) -> Tensor:
    """Root mean square principal cosine of two random spans, averaged over the sides of W [m, n]:
    sqrt(dimension / m) and sqrt(dimension / n)."""
    return ((dimension / shape[0]).sqrt() + (dimension / shape[1]).sqrt()) / 2


def rank_ranges(k: int) -> list[tuple[int, int]]:
    """At most RANGES ranges (start, stop) of about equal length that cover 0 to k."""
    edges = torch.linspace(0, k, min(k, RANGES) + 1).round().int().tolist()
    return list(itertools.pairwise(edges))


def _mean(a: Tensor, b: Tensor) -> float:
    return float((a.mean() + b.mean()) / 2)
