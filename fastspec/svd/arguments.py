"""What `topk_svd` asks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastspec.config import plain_number

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def labels_of(names: Sequence[str] | None, count: int, single: bool) -> list[str]:
    if names is None:
        return ["weights"] if single else [f"weights[{i}]" for i in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"names must hold one name per matrix ({count}), got {names!r}")
    return list(names)


def counts_of(k: int | Sequence[int], count: int, per_matrix: bool) -> list[int]:
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


def check_tensor(label: str, w: Any) -> None:
    if not isinstance(w, Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(w).__name__}")
    if w.is_quantized or w.dtype not in DTYPES:
        raise TypeError(
            f"{label} must be float64, float32, bfloat16 or float16, got {w.dtype}; "
            "dequantise quantised weights first"
        )
    if w.is_meta:
        raise ValueError(f"{label} is on the meta device and has no values; load the weights first")


def check_matrix(label: str, w: Any, k: Any) -> None:
    check_tensor(label, w)
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


def check_options(
    tol: float, max_steps: int | None, dtype: torch.dtype | None, workspace: int
) -> None:
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie in (0, 1), got {tol!r}")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps must be at least 1 or None, got {max_steps!r}")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype!r}")
    if workspace < 1:
        raise ValueError(f"workspace must be a positive number of bytes, got {workspace!r}")
