"""The cost model: which of the equivalent formulas runs a given call (design section 2, F2 to F5).

A plan is data. It is chosen per call from the sizes alone, can be printed (`layer.plan(n)`) and forced
(`Plan("factored", "two_sided")`). Every plan computes the same numbers up to rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

Forward = Literal["merged", "factored", "spectral"]
Gradient = Literal["none", "two_sided", "short", "dense"]
FORWARDS = ("merged", "factored", "spectral")
GRADIENTS = ("none", "two_sided", "short", "dense")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call computes.

    Args:
        forward: `"merged"`: W + U C Vh is written to a scratch buffer and multiplied once, in the
            forward and again in the backward (F2); `"factored"`: the plain product plus two thin ones;
            `"spectral"`: with a complete basis W = U S Vh, so y = (x Vh^T) (diag(S) + C)^T U^T and
            p and q come for nothing.
        gradient: `"none"`: no coefficient gradient is asked for; `"two_sided"`: p = x Vh^T, q = g U
            (F1); `"short"`: both projections over min(in, out) by the singular identity (F3);
            `"dense"`: from the weight gradient g^T x, which is never kept (F4; saves x, not p).
    """

    forward: Forward
    gradient: Gradient

    def __post_init__(self) -> None:
        if self.forward not in FORWARDS:
            raise ValueError(f"forward must be one of {FORWARDS}, got {self.forward!r}")
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {GRADIENTS}, got {self.gradient!r}")

    def __str__(self) -> str:
        return f"{self.forward}/{self.gradient}"


@dataclasses.dataclass(frozen=True)
class Costs:
    """Relative costs of a machine, in units of one flop of a large square GEMM.

    `thin` is the price of a flop in a product whose inner or outer size is k, by k; `byte` that of a
    byte moved. The defaults are estimates for a CPU, not calibrated on any one machine.
    """

    thin: tuple[tuple[int, float], ...] = ((16, 3.0), (64, 1.6), (128, 1.2), (1 << 30, 1.0))
    byte: float = 8.0

    def thin_price(self, k: int) -> float:
        return next(price for limit, price in self.thin if k <= limit)


COSTS = Costs()
KERNEL_RANK = 256  # the widest that fastspec.kernels takes
DYNAMIC_ROWS = 2048  # rows assumed by a compiled or exported graph that takes any number


def make_plan(
    n: int,
    in_features: int,
    out_features: int,
    k: int,
    *,
    core: str = "diag",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    needs_dx: bool = True,
    needs_delta: bool = True,
    singular_basis: bool = True,
    costs: Costs = COSTS,
) -> Plan:
    """The cheapest legal plan for `n` rows (tokens) and one layer.

    Args:
        n, in_features, out_features, k: sizes; `n` counts rows after flattening leading dimensions.
        core: "diag", "band" or "dense".
        dtype: the dtype of the products.
        device: device type.
        needs_dx: whether the gradient of the input is wanted.
        needs_delta: whether the gradient of the coefficients is wanted.
        singular_basis: whether `W V = U S` holds to rounding, which the short-side form rests on.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

        if not has_static_value(n):
            n = DYNAMIC_ROWS  # to compare a varying size would compile again on every side of it
    wide = dtype in (torch.float32, torch.float64)
    thin = costs.thin_price(k)
    weight = in_features * out_features
    itemsize = 8 if dtype == torch.float64 else 4

    # F2. One merge is 2 k in out flops and two passes over a weight; it happens once a direction. The
    # factored correction shares its first product (p or q) with the gradient, so only what the
    # gradient would not compute anyway counts against it.
    merge = 2 * k * weight * thin + 2 * weight * itemsize * costs.byte
    expand_y = 2 * n * k * out_features * thin + 2 * n * out_features * itemsize * costs.byte
    expand_dx = 2 * n * k * in_features * thin + 2 * n * in_features * itemsize * costs.byte
    project_x = 2 * n * k * in_features * thin
    project_g = 2 * n * k * out_features * thin

    def total(forward: Forward, gradient: Gradient) -> float:
        merged = forward == "merged"
        p_from_x = not merged or gradient == "two_sided"
        p_from_x = p_from_x or (gradient == "short" and in_features <= out_features)
        q_from_g = (not merged and needs_dx) or gradient == "two_sided"
        q_from_g = q_from_g or (gradient == "short" and out_features <= in_features)
        cost = p_from_x * project_x + q_from_g * project_g
        if forward == "spectral":
            # the second product of each direction is all there is
            cost += expand_y + expand_dx * needs_dx
            cost -= (
                2 * n * weight * (1 + needs_dx)
            )  # the plain products, which every other form makes
        elif merged:
            cost += merge * (1 + needs_dx)
        else:
            cost += expand_y + expand_dx * needs_dx
        if gradient == "short":
            if not p_from_x:
                cost += project_g  # y U has the size of g U
            if not q_from_g:
                cost += project_x  # dx V has the size of x V
        if gradient == "dense":
            cost += 2 * n * weight + 2 * k * weight * thin + weight * itemsize * costs.byte
        return cost

    gradients: list[Gradient] = ["two_sided", "dense"] if needs_delta else ["none"]
    if needs_delta and device == "cuda" and k <= KERNEL_RANK:
        gradients = ["two_sided"]  # the projection rides along in the kernels, and x is not saved
    if needs_delta and short_side_is_legal(
        in_features, out_features, core, dtype, device, needs_dx, singular_basis
    ):
        gradients.append("short")
    # In 16 bits a merged weight rounds the coefficients away: the correction is added instead.
    forwards: list[Forward] = ["merged", "factored"] if wide else ["factored"]
    if spectral_is_legal(in_features, out_features, k, dtype, device, singular_basis):
        forwards.append("spectral")
    best, least = None, 0.0
    for f in forwards:
        for gr in gradients:
            cost = total(f, gr)
            if f == "spectral" and gr not in ("none", "two_sided"):
                continue  # p and q are there already
            if best is None or cost < least:
                best, least = (f, gr), cost
    assert best is not None
    return Plan(*best)


def short_side_is_legal(
    in_features: int,
    out_features: int,
    core: str,
    dtype: torch.dtype,
    device: str,
    needs_dx: bool,
    singular_basis: bool,
) -> bool:
    """Whether the short-side identity (F3) may serve, as far as sizes can tell.

    It needs a singular basis and full-precision y and dx; its check of the values of sigma at run time
    would make a GPU wait; a band would have to be solved for; on a square it saves nothing.
    """
    return (
        singular_basis
        and device == "cpu"
        and core != "band"
        and dtype in (torch.float32, torch.float64)
        and in_features != out_features
        and (needs_dx or out_features < in_features)
    )


def spectral_is_legal(
    in_features: int,
    out_features: int,
    k: int,
    dtype: torch.dtype,
    device: str,
    singular_basis: bool,
) -> bool:
    """Whether W = U S Vh holds to rounding and may stand in for W: a complete singular basis.

    The first step must still be the pretrained model's bit for bit, so the values of delta are looked
    at when the layer runs, which would make a GPU wait.
    """
    return (
        singular_basis
        and k == min(in_features, out_features)
        and device == "cpu"
        and dtype in (torch.float32, torch.float64)
    )
