"""Eight numbers that tell an adapter's update in one basis from that in another.

A basis is made again where an adapter is loaded. Vectors of distinct singular values come out the same to
rounding; of tied ones every rotation among them is as right, so another number of threads or another machine
gives other vectors, between which the coefficients mean another update. The sketch of an update U C Vh is
t_j = y_j^T (U C Vh) x_j / |C| with signs x_j, y_j = +-1 known to everybody: for any matrix E the mean of
(y_j^T E x_j)^2 over all signs is |E|^2, so two sketches differ by about the relative distance of the updates.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastspec.cores import Core, core_matrix, low_rank_parts
from fastspec.precision import full_precision

PROBES = 8  # signs of one row of probes fill a byte
# measured: rounding below 2e-3 in 16 bits and 5e-5 in float32, vectors rotated among tied ones 0.2 to 1.4
TOLERANCE = 1e-2
# a low-rank core below this share of its factors' norms is the rounding of float64; float32 factors that
# cancel leave 1e-8 of them, or exactly nothing
CANCELLED = 1e-12


def probed(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """(U^T Y, Vh X), each [k, 8] in float32 at least: what the sketches of all updates in a basis need."""
    wide = torch.promote_types(u.dtype, torch.float32)
    y, x = (
        _signs(n, side).to(u.device, wide) for n, side in ((len(u), "out"), (vh.shape[1], "in"))
    )
    with full_precision(u.device.type):
        return u.detach().to(wide).mT @ y, vh.detach().to(wide) @ x


def sketch(basis: tuple[Tensor, Tensor], delta: Tensor, core: Core) -> Tensor:
    """The sketch [8] in float32 of the update with the coefficients `delta`; zeros of none.

    Args:
        basis: of `probed`.
        delta: storage of the core C, finite.
        core: its kind.
    """
    return sketches(basis, delta[None], core)[0]


def sketches(basis: tuple[Tensor, Tensor], deltas: Tensor, core: Core) -> Tensor:
    """Those [n, 8] of n updates in one basis: `deltas` [n, ...] are their coefficients."""
    with full_precision(deltas.device.type):
        t, norm = _probed_updates(*basis, deltas.detach(), core)
    return (t / norm.clamp_min(torch.finfo(t.dtype).tiny)[:, None]).to("cpu", torch.float32)


def _probed_updates(
    left: Tensor, right: Tensor, deltas: Tensor, core: Core
) -> tuple[Tensor, Tensor]:
    """y_j^T (U C Vh) x_j [n, 8] and |C| [n], both over one number for each of the n."""
    if core == "low_rank":
        # the outer products of a sum may cancel to the rounding of its coefficients; what is less is zero
        a, b = map(_scaled, low_rank_parts(deltas.double()))
        t = (left.double() * (a.mT @ (b @ right.double()))).sum(1)
        ra, rb = (torch.linalg.qr(f.mT, mode="r")[1] for f in (a, b))
        floor = CANCELLED * a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
        return t, torch.maximum((ra @ rb.mT).flatten(1).norm(dim=1), floor)
    c = deltas.to(left)
    if core == "diag":
        c = _scaled(c)
        return c @ (left * right), c.norm(dim=1)
    matrices = [core_matrix(one, core) for one in _scaled(c)]
    t = torch.stack([(left * (matrix @ right)).sum(0) for matrix in matrices])
    return t, torch.stack([matrix.norm() for matrix in matrices])


def _scaled(c: Tensor) -> Tensor:
    """Each of c [n, ...] over its largest entry: a square of it then stays within the range."""
    largest = c.abs().flatten(1).amax(1).clamp_min(torch.finfo(c.dtype).tiny)
    return c / largest.view(-1, *(1,) * (c.dim() - 1))


def distance(a: Tensor, b: Tensor) -> Tensor:
    """About the relative distance of the updates that two sketches [..., 8] are of."""
    return (a.double() - b.double()).square().mean(-1).sqrt()


def _signs(n: int, side: str) -> Tensor:
    """[n, 8] of +-1, the same on every machine and in every version, whatever its random generators do."""
    raw = bytearray(hashlib.shake_256(f"fastspec {side} {n}".encode()).digest(n))
    bits = torch.frombuffer(raw, dtype=torch.uint8)[:, None] >> torch.arange(
        PROBES, dtype=torch.uint8
    )
    return 1 - 2 * (bits & 1).to(torch.int8)
