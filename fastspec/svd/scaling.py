"""Powers of two that bring matrices to size 1, so that W^T W neither over- nor underflows."""

from __future__ import annotations

import torch
from torch import Tensor


def times_power(t: Tensor, exponent: Tensor) -> Tensor:  # [L, ...], [L] -> [L, ...]
    """t * 2^exponent, rounded at most once, and only where the result is subnormal or infinite.

    In two steps, because the power itself may lie beyond the range of the dtype.
    """
    half = exponent.div(2, rounding_mode="floor")
    shape = (-1,) + (1,) * (t.dim() - 1)
    one = torch.ones(len(exponent), dtype=t.dtype, device=t.device)
    first, second = (torch.ldexp(one, e).view(shape) for e in (half, exponent - half))
    return t * first * second


def exponents(weights: Tensor, dtype: torch.dtype, labels: list[str]) -> Tensor | None:  # [L]
    """e with 1 <= max |W| / 2^e < 2 for every matrix; None where all are near size 1 as they are.

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
    return torch.frexp(largest).exponent - 1


def in_range(s: Tensor, exponent: Tensor, labels: list[str]) -> Tensor:  # [L, k] -> [L, k]
    """s * 2^exponent.

    Raises:
        ValueError: a singular value is above the largest number of the dtype; the message names the matrix.
    """
    out = times_power(s, exponent)
    over = torch.isinf(out[:, 0])
    if bool(over.any()):
        i = int(over.nonzero()[0, 0])
        power = float(torch.log2(s[i, 0])) + int(exponent[i])
        raise ValueError(
            f"the largest singular value of {labels[i]} is 2^{power:.1f}, above the largest {s.dtype} "
            f"({torch.finfo(s.dtype).max:.1e}): scale the matrix down by a power of two"
            + ("" if s.dtype == torch.float64 else ", or pass it in float64")
        )
    return out
