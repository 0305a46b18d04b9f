"""The frozen factors of weight matrices: which directions a layer adapts, and how they are made."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from fastspec.config import Basis, Select, check_select, plain_number
from fastspec.fingerprint import tensor_fingerprint
from fastspec.svd.topk import topk_svd


@dataclasses.dataclass(frozen=True)
class Directions:
    """Which orthonormal directions of one matrix a layer adapts.

    Args:
        rank: how many; a range in `select` overrides it.
        select: "leading", "trailing" or the range (start, stop).
        basis: "svd" or "random".
        tol: relative residual asked of the singular triplets.
        seed: of the start block, and of the random basis together with the weight's own bytes.
    """

    rank: int
    select: Select = "leading"
    basis: Basis = "svd"
    tol: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", plain_number(self.rank))
        check_select(self.select)
        if not isinstance(self.select, str):
            object.__setattr__(self, "rank", self.select[1] - self.select[0])

    def triplets(self, short_side: int) -> tuple[int, int]:
        """(start, stop) among the singular triplets of a matrix with that short side."""
        start, stop = 0, self.rank
        if self.select == "trailing":
            start, stop = short_side - self.rank, short_side
        elif self.select != "leading":
            start, stop = self.select  # type: ignore[misc]
        if not 0 <= start < stop <= short_side:
            raise ValueError(
                f"rank {self.rank} with select={self.select!r} asks for triplets {start} to {stop}, "
                f"but the matrix has min(in, out) = {short_side} of them"
            )
        return start, stop


@dataclasses.dataclass(frozen=True)
class Factors:
    """Frozen factors of one matrix [out, in]: u [out, k], s [k], vh [k, in].

    `singular` says that W V = U S holds to rounding, which the short-side products rest on (F3).
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    singular: bool

    @classmethod
    def empty(cls, matrix: Tensor, k: int) -> Factors:
        """Unset factors for a matrix [out, in], of its device: to be made when it has its values."""
        wide = torch.promote_types(matrix.dtype, torch.float32)
        (out_features, in_features), new = matrix.shape, matrix.new_empty
        s = new(k, dtype=wide)
        return cls(new(out_features, k), s, new(k, in_features), singular=False)


def factorize(
    weights: list[Tensor],
    directions: list[Directions],
    names: list[str] | None = None,
    progress: bool | None = False,
) -> list[Factors]:
    """Factors of many matrices [out, in]; those of one shape are factorised as one stack.

    Raises:
        ValueError: a rank or range does not fit, or values are not finite; the message names the matrix.
    """
    names = names or [f"weights[{i}]" for i in range(len(weights))]
    device = weights[0].device.type if weights else "cpu"
    # factors outlive this call, which may be one of inference or under autocast
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        return _factorize(weights, directions, names, progress)


def _factorize(
    weights: list[Tensor], directions: list[Directions], names: list[str], progress: bool | None
) -> list[Factors]:
    ranges = []
    for w, d, name in zip(weights, directions, names, strict=True):
        try:
            ranges.append(d.triplets(min(w.shape)))
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None
    out: list[Factors | None] = [None] * len(weights)
    groups: dict[tuple[float, int], list[int]] = {}
    for i, d in enumerate(directions):
        if d.basis == "random":
            out[i] = _random_factors(weights[i], d, names[i])
        else:
            groups.setdefault((d.tol, d.seed), []).append(i)
    for (tol, seed), members in groups.items():
        svds = topk_svd(
            [weights[i].detach() for i in members],
            [ranges[i][1] for i in members],
            tol=tol,
            seed=seed,
            names=[names[i] for i in members],
            progress=progress,
        )
        assert isinstance(svds, list)
        for i, svd in zip(members, svds, strict=True):
            start, stop = ranges[i]
            out[i] = Factors(
                svd.u[:, start:stop].contiguous(),
                svd.s[start:stop].contiguous(),
                svd.vh[start:stop].contiguous(),
                singular=True,
            )
    return out  # type: ignore[return-value]


def _random_factors(weight: Tensor, d: Directions, name: str) -> Factors:
    """A random orthonormal basis of the weight's sides; s_i = u_i^T W v_i, which is no singular value."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    w = weight.detach().to(wide)
    if not bool(torch.isfinite(w).all()):
        raise ValueError(f"{name}: the weight holds values that are not finite (NaN or infinity)")
    digest = hashlib.sha256(f"{d.seed}{tensor_fingerprint(weight)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    sides = [
        torch.linalg.qr(torch.randn(m, d.rank, generator=generator, dtype=torch.float64))[0]
        for m in w.shape
    ]
    u, v = (q.to(device=w.device, dtype=wide) for q in sides)
    s = torch.einsum("ok,oi,ik->k", u, w, v)
    vh = v.mT.contiguous().to(weight.dtype)
    # rows as of a singular basis: TMA fetches no other, and QR leaves columns
    return Factors(u.contiguous().to(weight.dtype), s, vh, singular=False)
