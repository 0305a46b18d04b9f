"""Leading singular triplets of a matrix, a stack or a list of many shapes, residuals certified.

The public function checks its input once, groups matrices by shape, cuts each group into chunks
that respect the workspace bound, transposes matrices whose short side does not come last, and hands
the chunk to the cheaper of two methods (design section 4):

    triplets.py    eigenvectors of the float64 Gram matrix, and what makes triplets of a subspace
    krylov.py      the leading subspace by block Krylov iteration

Where csrc/ is compiled, `fastspec::topk_svd` is both of them. options.py holds what the two
implementations share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastspec import _extension, progress
from fastspec.precision import full_precision
from fastspec.svd import krylov
from fastspec.svd.arguments import (
    check_matrix,
    check_options,
    check_tensor,
    counts_of,
    labels_of,
)
from fastspec.svd.options import Options, residual_floor
from fastspec.svd.scaling import exponents, in_range, times_power
from fastspec.svd.triplets import (
    Triplets,
    chunk_size,
    exact_triplets,
    gram_triplets,
    rayleigh_ritz,
    residual,
)
from fastspec.svd.workers import in_parts


class ConvergenceWarning(UserWarning):
    """A triplet of `topk_svd` does not meet `tol`: the step limit was reached, or rounding forbids it."""


@dataclasses.dataclass(frozen=True)
class TopkSVD:
    """Leading singular triplets, largest first. For a stack every field has a leading dimension L.

    `W v_i = s_i u_i`, `W^T u_i = s_i v_i`. In each right vector the first entry whose magnitude is
    within 1% of the largest is positive; that fixes the signs.

    Attributes:
        u: left vectors [m, k], orthonormal columns, also where singular values vanish.
        s: singular values [k], descending; float32, or float64 for float64 input.
        vh: right vectors [k, n], orthonormal rows.
        residual: [] largest of `|W v_i - s_i u_i| / d_i` and `|W^T u_i - s_i v_i| / d_i` over i,
            with `d_i = max(s_i, floor * s_1)` and floor = 2^-8 (float64 vectors of float64 input:
            2^-26). Rounding the vectors to float32 alone leaves an error near 3e-8 s_1, so below the
            floor, and for singular values that are zero, the error is measured against the floor. It
            is 0 for a zero matrix. It is that of the tensors returned here, rounded as they are; only
            vectors stored narrower than float32 are measured as float32, before their last rounding.
        converged: [] bool, `residual <= tol`. False too where the singular values are so near the
            smallest numbers of their dtype that their own rounding exceeds `tol`.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    residual: Tensor
    converged: Tensor


def topk_svd(
    weights: Tensor | Sequence[Tensor],
    k: int | Sequence[int],
    *,
    tol: float = 1e-5,
    max_steps: int | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    workspace: int = 1 << 30,
    progress: bool | None = None,
) -> TopkSVD | list[TopkSVD]:
    """The k largest singular triplets of every matrix.

    Args:
        weights: one matrix [m, n], a stack [L, m, n], or a sequence of matrices of any shapes.
            float64 is computed in float64, everything narrower in float32 or better.
        k: triplets wanted, 1 <= k <= min(m, n); for a sequence also one count per matrix.
        tol: relative residual asked of every triplet, in (0, 1).
        max_steps: most block steps of the iteration for one matrix; None: as many as the short side
            allows, with which every matrix converges.
        seed: seed of the private generator of the start block; it moves the result by no more
            than the residual.
        names: one name per matrix, for error messages.
        dtype: dtype of `u` and `vh`; None: that of the input.
        workspace: bytes of scratch memory to stay below. One matrix is always worked on, its iteration
            restarted with the best vectors found (about 3 k of them) where more do not fit.
        progress: True shows a bar on stderr, False none, None only once it has taken over a second.

    Returns:
        `TopkSVD`, for a sequence a list of them in the same order.

    Raises:
        TypeError: not floating-point tensors (integer, quantised, complex), or k not an integer.
        ValueError: wrong number of dimensions, empty, meta or non-finite matrices, an argument out
            of range, a singular value above the largest number of its dtype.

    Warns:
        ConvergenceWarning: a matrix did not reach `tol`, because `max_steps` ended the iteration, or
            because its singular values or vectors can't be rounded that well; see `converged`.
    """
    if isinstance(weights, Tensor):
        if weights.dim() not in (2, 3):
            raise ValueError(
                "weights must be a matrix [m, n], a stack [L, m, n] or a sequence of matrices, "
                f"got a tensor of shape {tuple(weights.shape)}"
            )
        if weights.dim() == 3 and weights.shape[0] == 0:
            raise ValueError(f"weights is an empty stack of shape {tuple(weights.shape)}")
        check_tensor("weights", weights)
        matrices = [weights] if weights.dim() == 2 else list(weights)
    else:
        matrices = list(weights)
    labels = labels_of(
        names, len(matrices), single=isinstance(weights, Tensor) and weights.dim() == 2
    )
    counts = counts_of(k, len(matrices), per_matrix=not isinstance(weights, Tensor))
    for label, w, count in zip(labels, matrices, counts, strict=True):
        check_matrix(label, w, count)
    check_options(tol, max_steps, dtype, workspace)

    groups: dict[tuple, list[int]] = {}
    for i, (w, count) in enumerate(zip(matrices, counts, strict=True)):
        groups.setdefault((tuple(w.shape), w.dtype, w.device, count), []).append(i)
    stacks: list[tuple[list[int], TopkSVD]] = []
    devices = {w.device.type for w in matrices}
    # with fewer digits the iteration would stall at 1e-3
    with torch.no_grad(), full_precision(*devices), _progress(progress, len(matrices)) as advance:
        for (shape, _, _, count), members in groups.items():
            size = chunk_size(shape, count, matrices[members[0]].dtype, workspace)
            for start in range(0, len(members), size):
                chunk = members[start : start + size]
                if isinstance(weights, Tensor) and weights.dim() == 3:
                    stack = weights[chunk[0] : chunk[-1] + 1]
                else:
                    stack = torch.stack([matrices[i] for i in chunk])
                found = _chunk_svd(
                    stack,
                    [labels[i] for i in chunk],
                    count,
                    tol,
                    dtype,
                    max_steps,
                    seed,
                    workspace,
                )
                stacks.append((chunk, found))
                advance(len(chunk))
    _warn_unconverged(stacks, labels, tol)

    if isinstance(weights, Tensor):
        if weights.dim() == 2:
            return _select(stacks[0][1], 0)
        return _concatenate([found for _, found in stacks])
    results: list[Any] = [None] * len(matrices)
    for chunk, found in stacks:
        for position, i in enumerate(chunk):
            results[i] = _select(found, position)
    return results


def _chunk_svd(
    weights: Tensor,  # [L, m, n]
    labels: list[str],
    k: int,
    tol: float,
    dtype: torch.dtype | None,
    max_steps: int | None,
    seed: int,
    workspace: int,
) -> TopkSVD:
    source = weights.dtype
    compute = source if source == torch.float64 else torch.float32
    out = dtype or source
    # vectors narrower than float32 are certified as float32
    certified = compute if out == torch.float64 else torch.float32
    transposed = weights.shape[1] < weights.shape[2]
    w = weights.to(compute)
    w = w.mT if transposed else w  # [L, long, short]
    exponent = exponents(weights, compute, labels)
    if exponent is not None:
        w = times_power(w, -exponent)
    try:
        found = _leading_triplets(w, k, tol, max_steps, seed, workspace, residual_floor(certified))
    except torch.linalg.LinAlgError as error:
        of = labels[0] if len(labels) == 1 else f"the stack {labels[0]} .. {labels[-1]}"
        raise torch.linalg.LinAlgError(f"in {of}: {error}") from error
    found = _as_returned(w, found, residual_floor(certified), certified, exponent, labels)
    u, vh = (found.right, found.left.mT) if transposed else (found.left, found.right.mT)
    sign = _signs(vh)
    u.mul_(sign[:, None, :])
    vh.mul_(sign[:, :, None])
    return TopkSVD(
        u=u.to(out).contiguous(),
        s=found.s,
        vh=vh.to(out).contiguous(),
        residual=found.residual.to(compute),
        converged=found.residual <= tol,
    )


def _leading_triplets(
    w: Tensor,
    k: int,
    tol: float,
    max_steps: int | None,
    seed: int,
    workspace: int,
    floor: float,
) -> Triplets:
    """Triplets of a stack [L, m, n], m >= n, by the cheaper method."""
    iterate = krylov.worthwhile(k, w.shape[-1])
    compiled = _extension.serves(w)
    width = krylov.block_width(k, w.shape[-1], compiled) if iterate else 0
    options = Options(
        k=k,
        tol=tol,
        floor=floor,
        max_steps=max_steps or 0,
        seed=seed,
        width=width,
        most=krylov.most_vectors(w, k, width, workspace),
    )
    if compiled:
        return Triplets(*torch.ops.fastspec.topk_svd(w, **vars(options)))
    if w.device.type == "cpu":
        return in_parts(lambda part: leading_triplets(part, options), w)
    return leading_triplets(w, options)


def _as_returned(
    w: Tensor,
    found: Triplets,
    floor: float,
    certified: torch.dtype,
    exponent: Tensor | None,
    labels: list[str],
) -> Triplets:
    """`found` with the roundings of the result, and the residual of what they made of it.

    `found` are triplets of `w`, the result those of `w * 2^exponent`.
    """
    left, s, right = found.left.to(certified), found.s, found.right.to(certified)
    measured = s
    if exponent is not None:
        s = in_range(s, exponent, labels)
        measured = times_power(s, -exponent)
    if certified == w.dtype and (measured is s or torch.equal(measured, found.s)):
        return Triplets(left, s, right, found.residual)
    return Triplets(left, s, right, residual(w, left, measured, right, floor))


def leading_triplets(w: Tensor, options: Options) -> Triplets:
    """What `fastspec::topk_svd` returns for a stack [L, m, n], m >= n, in Python."""
    iterate = options.width > 0

    def iterated(w: Tensor) -> Triplets:
        return rayleigh_ritz(w, krylov.krylov_subspace(w, options), options, compute)

    def redo(late: Tensor, method: Callable[[Tensor], Triplets]) -> None:
        if bool(late.any()):
            for field, improved in zip(found, method(w[late].double()), strict=True):
                field[late] = improved.to(field.dtype)

    compute = w.dtype
    found = iterated(w) if iterate else gram_triplets(w, options)
    if iterate and options.max_steps:
        return found
    if iterate and compute == torch.float32:
        # s_1 / s_k is so large that rounding W^T W v to float32 costs more than tol
        redo(~(found.residual <= options.tol), iterated)
    late = ~(found.residual <= options.tol)
    if compute == torch.float32:  # else it is the rounding of the result
        late &= found.s[:, -1] <= options.small * found.s[:, 0]
    redo(late, lambda w: exact_triplets(w, options, compute))
    return found


def _signs(vh: Tensor) -> Tensor:  # [L, k, n] -> [L, k]
    """+-1 per vector. The 1% keeps entries that tie but for rounding from deciding by chance."""
    size = vh.abs()
    first = (size >= 0.99 * size.amax(dim=-1, keepdim=True)).to(torch.uint8).argmax(dim=-1)
    entry = vh.gather(-1, first[..., None])[..., 0]
    return torch.where(entry < 0, -1.0, 1.0).to(vh.dtype)


def _select(stack: TopkSVD, i: int) -> TopkSVD:
    # clones: a matrix kept from a list must not hold the memory of its whole group
    return TopkSVD(**{f.name: getattr(stack, f.name)[i].clone() for f in dataclasses.fields(stack)})


def _concatenate(stacks: list[TopkSVD]) -> TopkSVD:
    if len(stacks) == 1:
        return stacks[0]
    names = [f.name for f in dataclasses.fields(TopkSVD)]
    return TopkSVD(**{n: torch.cat([getattr(s, n) for s in stacks]) for n in names})


def _warn_unconverged(
    stacks: list[tuple[list[int], TopkSVD]], labels: list[str], tol: float
) -> None:
    late = [
        (float(found.residual[position]), labels[i], found.s[position, 0])
        for chunk, found in stacks
        for position, i in enumerate(chunk)
        if not found.converged[position]
    ]
    if late:
        worst, label, first = max(late, key=lambda one: one[0])
        tiny = residual_floor(first.dtype) * float(first) < torch.finfo(first.dtype).tiny
        advice = (
            f"its singular values are among the smallest of {first.dtype}, scale it up by a power of two"
            if tiny
            else "raise max_steps or tol"
        )
        warnings.warn(
            f"{len(late)} of {len(labels)} matrices did not reach tol={tol:g}: worst residual "
            f"{worst:.1e} in {label}; {advice}",
            ConvergenceWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _progress(show: bool | None, total: int) -> Iterator[Callable[[int], Any]]:
    if show is False:
        yield lambda count: None
        return
    try:
        bar = progress.bar(total, "topk_svd", "matrix", delay=0 if show else 1, leave=False)
    except ImportError:
        yield lambda count: None
        return
    with bar:
        yield bar.update
