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
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastspec import _extension
from fastspec.config import plain_number
from fastspec.precision import full_float32
from fastspec.svd import krylov
from fastspec.svd.options import Options, residual_floor
from fastspec.svd.triplets import Triplets, chunk_size, exact_triplets, gram_triplets, rayleigh_ritz

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ConvergenceWarning(UserWarning):
    """The step limit of `topk_svd` was reached before every triplet met `tol`."""


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
            with `d_i = max(s_i, floor * s_1)` and floor = 2^-8 (float64 input: 2^-26). Rounding
            the vectors to float32 alone leaves an error near 3e-8 s_1, so below the floor, and for
            singular values that are zero, the error is measured against the floor. It is 0 for a
            zero matrix. Vectors stored narrower than float32 are measured before that rounding.
        converged: [] bool, `residual <= tol`.
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
            of range.

    Warns:
        ConvergenceWarning: `max_steps` ended the iteration first; see `converged`.
    """
    if isinstance(weights, Tensor):
        if weights.dim() not in (2, 3):
            raise ValueError(
                "weights must be a matrix [m, n], a stack [L, m, n] or a sequence of matrices, "
                f"got a tensor of shape {tuple(weights.shape)}"
            )
        if weights.dim() == 3 and weights.shape[0] == 0:
            raise ValueError(f"weights is an empty stack of shape {tuple(weights.shape)}")
        _check_tensor("weights", weights)
        matrices = [weights] if weights.dim() == 2 else list(weights)
    else:
        matrices = list(weights)
    labels = _labels(
        names, len(matrices), single=isinstance(weights, Tensor) and weights.dim() == 2
    )
    counts = _counts(k, len(matrices), per_matrix=not isinstance(weights, Tensor))
    for label, w, count in zip(labels, matrices, counts, strict=True):
        _check_matrix(label, w, count)
    _check_options(tol, max_steps, dtype, workspace)

    groups: dict[tuple, list[int]] = {}
    for i, (w, count) in enumerate(zip(matrices, counts, strict=True)):
        groups.setdefault((tuple(w.shape), w.dtype, w.device, count), []).append(i)
    stacks: list[tuple[list[int], TopkSVD]] = []
    devices = {w.device.type for w in matrices}
    with torch.no_grad(), _full_precision(devices), _progress(progress, len(matrices)) as advance:
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
    transposed = weights.shape[1] < weights.shape[2]
    w = weights.to(compute)
    w = w.mT if transposed else w  # [L, long, short]
    scale = _scale(weights, labels, compute)
    if scale is not None:
        w = w / scale[:, None, None]
    try:
        found = _leading_triplets(w, k, tol, max_steps, seed, workspace)
    except torch.linalg.LinAlgError as error:
        of = labels[0] if len(labels) == 1 else f"the stack {labels[0]} .. {labels[-1]}"
        raise torch.linalg.LinAlgError(f"in {of}: {error}") from error
    u, vh = (found.right, found.left.mT) if transposed else (found.left, found.right.mT)
    sign = _signs(vh)
    u.mul_(sign[:, None, :])
    vh.mul_(sign[:, :, None])
    out = dtype or source
    return TopkSVD(
        u=u.to(out).contiguous(),
        s=found.s if scale is None else found.s * scale[:, None],
        vh=vh.to(out).contiguous(),
        residual=found.residual.to(compute),
        converged=found.residual <= tol,
    )


def _leading_triplets(
    w: Tensor, k: int, tol: float, max_steps: int | None, seed: int, workspace: int
) -> Triplets:
    """Triplets of a stack [L, m, n], m >= n, by the cheaper method."""
    iterate = krylov.worthwhile(k, w.shape[-1])
    compiled = _extension.serves(w)
    width = krylov.block_width(k, w.shape[-1], compiled) if iterate else 0
    options = Options(
        k=k,
        tol=tol,
        floor=residual_floor(w.dtype),
        max_steps=max_steps or 0,
        seed=seed,
        width=width,
        most=krylov.most_vectors(w, k, width, workspace),
    )
    if compiled:
        return Triplets(*torch.ops.fastspec.topk_svd(w, **vars(options)))
    return leading_triplets(w, options)


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


def _labels(names: Sequence[str] | None, count: int, single: bool) -> list[str]:
    if names is None:
        return ["weights"] if single else [f"weights[{i}]" for i in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"names must hold one name per matrix ({count}), got {names!r}")
    return list(names)


def _counts(k: int | Sequence[int], count: int, per_matrix: bool) -> list[int]:
    k = plain_number(k)
    if isinstance(k, int):
        return [k] * count
    if not per_matrix:
        raise TypeError(f"k must be an int for a matrix or a stack, got {k!r}")
    if not isinstance(k, Sequence) or isinstance(k, str):
        raise TypeError(f"k must be an int or a sequence of ints, got {k!r}")
    if len(k) != count:
        raise ValueError(f"k must hold one count per matrix ({count}), got {len(k)} of them")
    return list(map(plain_number, k))


def _check_tensor(label: str, w: Any) -> None:
    if not isinstance(w, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(w).__name__}")
    if w.is_quantized or w.dtype not in _DTYPES:
        raise TypeError(
            f"{label} must be float64, float32, bfloat16 or float16, got {w.dtype}; "
            "dequantise quantised weights first"
        )
    if w.is_meta:
        raise ValueError(f"{label} is on the meta device and has no values; load the weights first")


def _check_matrix(label: str, w: Any, k: Any) -> None:
    _check_tensor(label, w)
    if w.dim() != 2:
        raise ValueError(f"{label} must be a matrix [m, n], got shape {tuple(w.shape)}")
    if w.numel() == 0:
        raise ValueError(f"{label} is empty: shape {tuple(w.shape)}")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r} for {label}")
    if not 1 <= k <= min(w.shape):
        raise ValueError(
            f"k must lie between 1 and {min(w.shape)}, the short side of {label} "
            f"{tuple(w.shape)}, got {k}"
        )


def _check_options(
    tol: float, max_steps: int | None, dtype: torch.dtype | None, workspace: int
) -> None:
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie in (0, 1), got {tol!r}")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1 or None, got {max_steps!r}")
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype!r}")
    if workspace < 1:
        raise ValueError(f"workspace must be a positive number of bytes, got {workspace!r}")


def _scale(weights: Tensor, labels: list[str], dtype: torch.dtype) -> Tensor | None:  # [L]
    """What to divide each matrix by so that W^T W neither over- nor underflows; None: nothing.

    Raises:
        ValueError: a matrix holds values that are not finite.
    """
    flat = weights.to(dtype).flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1)
    if bool(((norm > 2.0**-20) & (norm < 2.0**20)).all()):
        return None  # which NaN and infinity can't be
    largest = torch.linalg.vector_norm(flat, float("inf"), dim=1)
    bad = ~torch.isfinite(largest)
    if bad.any():
        which = [label for label, b in zip(labels, bad.tolist(), strict=True) if b]
        more = f" and {len(which) - 1} more" if len(which) > 1 else ""
        raise ValueError(f"non-finite values in {which[0]}{more}: NaN or infinity has no SVD")
    # a power of two, so that scaling rounds nothing
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)


def _warn_unconverged(
    stacks: list[tuple[list[int], TopkSVD]], labels: list[str], tol: float
) -> None:
    late = [
        (float(found.residual[position]), labels[i])
        for chunk, found in stacks
        for position, i in enumerate(chunk)
        if not found.converged[position]
    ]
    if late:
        worst, label = max(late)
        warnings.warn(
            f"{len(late)} of {len(labels)} matrices did not reach tol={tol:g}: worst residual "
            f"{worst:.1e} in {label}; raise max_steps or tol",
            ConvergenceWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _full_precision(devices: set[str]) -> Iterator[None]:
    """No autocast, TF32 or bf16 products: they would stall the iteration at 1e-3."""
    with full_float32(), contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def _progress(show: bool | None, total: int) -> Iterator[Callable[[int], Any]]:
    if show is False:
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
        return
    delay = 0 if show else 1
    with tqdm(
        total=total, desc="topk_svd", unit="matrix", file=sys.stderr, delay=delay, leave=False
    ) as bar:
        yield bar.update
