"""The numbers of one call that both implementations of `topk_svd` read, the compiled one as its arguments."""

from __future__ import annotations

import dataclasses

import torch


def residual_floor(dtype: torch.dtype) -> float:
    """Part of s_1 below which a residual is measured against that part, not against s_i."""
    return 2.0**-26 if dtype == torch.float64 else 2.0**-8


@dataclasses.dataclass(frozen=True)
class Options:
    """One problem, and the constants of the method.

    The operator `fastspec::topk_svd` takes every field by its name and has no default of its own, so a
    constant has one place, this one. A "rounding" is the machine epsilon of the dtype computed in.

    Attributes:
        k: triplets wanted.
        tol: relative residual asked of every triplet.
        floor: `residual_floor` of the dtype of the result.
        max_steps: most block steps; 0: as many as it takes.
        seed: of the start block.
        width: columns of a block; 0: no iteration, the eigenvectors of the Gram matrix at once.
        most: basis vectors held at once; beyond, a restart with the best of them.
    """

    k: int
    tol: float
    floor: float
    max_steps: int
    seed: int
    width: int
    most: int

    # Short side up to which the Gram matrix is formed. One product with it replaces two with W, and forming
    # it runs at full speed, which narrow products do not: it pays when the basis grows past a sixth of the
    # short side or so.
    gram_short: int = 1024

    # Of the basis vectors made before the first check, 2 k + 6 width more: where decaying spectra converge
    # ((1 + i / 30)^-0.7, short sides 768 to 4096, k 16 to 64; MiniLM's weights at k = 32 need 8 more on
    # average).
    first_check: int = 56

    # Basis vectors made in all, in short sides, after which a restarted iteration ends as it is.
    restarted_lengths: int = 10

    # Part of tol that the estimated residual has to meet: the measured one, which decides, holds the rounding
    # of the vectors too.
    margin: float = 0.5

    # Values within this many tolerances of one another may be one value of higher multiplicity: Ritz vectors
    # that mix values further apart would not have passed for converged.
    coincidence: float = 30.0

    # Left vectors of values below this part of the largest are orthonormalised by Householder reflections:
    # dividing by s_i leaves |u_i . u_j| up to eps s_1^2 / (s_i s_j), 1e-8 here.
    small: float = 1e-4

    # s_1 / s_k beyond which the last products with W are float64: float32 would leave that many of its
    # roundings in the left vectors.
    wide_ratio: float = 16.0

    # Roundings of s_1^2 in an error of W^T W v below which iterating improves nothing.
    stagnation: float = 4.0

    # Roundings of s_1^2 below which a block that is left has no direction of its own: the subspace is
    # invariant.
    negligible: float = 64.0

    # Square roots of a rounding below which, in parts of the largest, a pivot of a Cholesky factor is made of
    # rounding errors.
    breakdown: float = 8.0
