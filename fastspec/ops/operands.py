"""The operands of one call: their sizes checked once, by the name of the argument, and their dtypes."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from fastspec.config import check_choice
from fastspec.cores import CORES, delta_shape

# Of x, weight, bias, u, s, vh and delta; with sizes that torch.compile traces where it does.
Sizes: TypeAlias = tuple[
    torch.Size, torch.Size, torch.Size | None, torch.Size, torch.Size, torch.Size, torch.Size
]


def cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and the bias in the dtype of the products: autocast's where that is on, else the weight's.

    Raises:
        TypeError: without autocast, x has another dtype than the weight.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x must have the weight's dtype {weight.dtype}, got {x.dtype}: cast it, or use autocast"
        )
    return x, bias


def sizes_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    delta: torch.Size,
) -> Sizes:
    """The sizes of a layer's operands, in the order of `check_sizes`.

    Raises:
        TypeError: x is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    return (
        x.shape,
        weight.shape,
        None if bias is None else bias.shape,
        u.shape,
        s.shape,
        vh.shape,
        delta,
    )


def check_sizes(sizes: Sizes, core: str) -> None:
    """Refuse operands that are not one layer's, by the name of the argument."""
    x, weight, bias, u, s, vh, delta = sizes
    check_choice("core", core, CORES)
    if len(weight) != 2 or len(u) != 2 or len(vh) != 2:
        raise ValueError("weight, u and vh must be matrices")
    (out_features, in_features), k = weight, u[1]
    if len(x) < 1 or x[-1] != in_features:
        raise ValueError(f"x must be [..., {in_features}] for this weight, got {tuple(x)}")
    if core == "band" and (len(delta) != 2 or delta[0] % 2 == 0 or delta[1] != k):
        raise ValueError(
            f"delta must be [2 * half_width + 1, {k}] for core='band', got {tuple(delta)}"
        )
    if core == "low_rank" and (len(delta) != 2 or not delta[0] or delta[0] % 2 or delta[1] != k):
        raise ValueError(
            f"delta must be [2 * core_rank, {k}] for core='low_rank', got {tuple(delta)}"
        )
    expected: list[tuple[str, torch.Size, tuple[int, ...]]] = [
        ("u", u, (out_features, k)),
        ("s", s, (k,)),
        ("vh", vh, (k, in_features)),
    ]
    if bias is not None:
        expected.append(("bias", bias, (out_features,)))
    if core not in ("band", "low_rank"):
        expected.append(("delta", delta, delta_shape(core, k)))
    for name, given, wanted in expected:
        if given != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(given)}")
