"""The cost model: which of the equivalent formulas runs a given call (design section 2, F2 to F5).

A plan is data. It is chosen per call from the sizes alone, can be printed (`layer.plan(n)`) and forced
(`Plan("factored", "two_sided")`). Every plan computes the same numbers up to rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

Forward = Literal["merged", "saved", "resident", "factored", "spectral"]
Gradient = Literal["none", "two_sided", "short", "dense"]
FORWARDS = ("merged", "saved", "resident", "factored", "spectral")
GRADIENTS = ("none", "two_sided", "short", "dense")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call computes.

    Args:
        forward: `"merged"`: W + U C Vh is written to a scratch buffer and multiplied once, in the
            forward and again in the backward (F2); `"saved"`: it is written once, and saved for the
            backward; `"resident"`: the same with a copy that the caller keeps
            (`SpectralLinear.keep_merged`); `"factored"`: the plain product plus two thin ones;
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
class Work:
    """What a plan adds to the two plain products of a layer (negative where it leaves them out).

    Args:
        flops: of products as large as the layer's own.
        thin_flops: of products whose inner or outer size is k.
        bytes: moved by passes over a matrix beside the products.
    """

    flops: int
    thin_flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Costs:
    """Relative costs of a machine, in units of one flop of a large square product.

    `thin` is the price of a flop in a product whose inner or outer size is k, by the largest k it stands
    for; `byte` that of a byte moved. `python bench/calibrate.py` says what the defaults are worth on a
    machine (on that of docs/benchmarks.md, 1.3 % over the best plan of each problem in the geometric
    mean) and fits others; those fitted to half of its problems did no better on the other half.
    """

    thin: tuple[tuple[int, float], ...] = ((16, 3.0), (64, 1.6), (128, 1.2), (1 << 30, 1.0))
    byte: float = 8.0

    def thin_price(self, k: int) -> float:
        return next(price for limit, price in self.thin if k <= limit)

    def of(self, work: Work, k: int) -> float:
        return work.flops + self.thin_price(k) * work.thin_flops + self.byte * work.bytes


COSTS = Costs()
KERNEL_RANK = 256  # the widest that fastspec.kernels takes
DYNAMIC_ROWS = 2048  # rows assumed by a compiled or exported graph that takes any number


def work_of(
    plan: Plan,
    n: int,
    in_features: int,
    out_features: int,
    k: int,
    itemsize: int = 4,
    needs_dx: bool = True,
) -> Work:
    """What `plan` adds for `n` rows (tokens) of one layer, in one forward and backward (F2 to F4)."""
    forward, gradient = plan.forward, plan.gradient
    weight = in_features * out_features
    flops = thin = moved = 0
    one_product = forward in ("merged", "saved", "resident")

    # The factored correction and the complete basis share their first products, p and q, with the
    # gradient: only what the gradient would not compute anyway counts against them.
    p_from_x = (
        not one_product
        or gradient == "two_sided"
        or (gradient == "short" and in_features <= out_features)
    )
    q_from_g = (
        (not one_product and needs_dx)
        or gradient == "two_sided"
        or (gradient == "short" and out_features <= in_features)
    )
    # a flag is never a factor: torch.compile gives sizes that no bool multiplies
    inside = in_features if p_from_x else 0
    outside = out_features if q_from_g else 0
    if gradient == "short":  # y U has the size of g U, dx V that of x V
        inside += in_features if not q_from_g else 0
        outside += out_features if not p_from_x else 0
    thin += 2 * n * k * (inside + outside)

    if forward in ("merged", "saved"):  # a product of the weight's size, read and written
        times = 2 if needs_dx and forward == "merged" else 1
        thin += 2 * k * weight * times
        moved += 2 * weight * itemsize * times
    elif not one_product:
        wide = out_features + (in_features if needs_dx else 0)
        thin += 2 * n * k * wide
        moved += 2 * n * wide * itemsize
    if forward == "spectral":
        flops -= 2 * n * weight * (2 if needs_dx else 1)
    if gradient == "dense":
        flops += 2 * n * weight
        thin += 2 * k * weight
        moved += weight * itemsize
    return Work(flops, thin, moved)


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
    resident: bool = False,
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
        resident: whether the caller keeps W + U C Vh and gives it in the weight's place.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

        if not has_static_value(n):
            n = DYNAMIC_ROWS  # to compare a varying size would compile again on every side of it
    itemsize = 8 if dtype == torch.float64 else 4

    def cost(plan: Plan) -> float:
        work = work_of(plan, n, in_features, out_features, k, itemsize, needs_dx)
        return costs.of(work, k)

    plans = legal_plans(
        n,
        in_features,
        out_features,
        k,
        core=core,
        dtype=dtype,
        device=device,
        needs_dx=needs_dx,
        needs_delta=needs_delta,
        singular_basis=singular_basis,
        resident=resident,
    )
    best, least = plans[0], cost(plans[0])  # torch.compile traces this, but no min() with a key
    for plan in plans[1:]:
        if (this := cost(plan)) < least:
            best, least = plan, this
    return best


def legal_plans(
    n: int,
    in_features: int,
    out_features: int,
    k: int,
    *,
    core: str,
    dtype: torch.dtype,
    device: str,
    needs_dx: bool,
    needs_delta: bool,
    singular_basis: bool,
    resident: bool = False,
) -> list[Plan]:
    """The plans worth weighing for a layer; arguments as for `make_plan`."""
    gradients: list[Gradient] = ["two_sided", "dense"] if needs_delta else ["none"]
    if needs_delta and device == "cuda" and k <= KERNEL_RANK:
        gradients = ["two_sided"]  # the projection rides along in the kernels, and x is not saved
    if needs_delta and short_side_is_legal(
        in_features, out_features, core, dtype, device, needs_dx, singular_basis
    ):
        gradients.append("short")
    # In 16 bits a merged weight rounds the coefficients away: the correction is added instead.
    wide = dtype in (torch.float32, torch.float64)
    forwards: list[Forward] = ["merged", "factored"] if wide else ["factored"]
    if resident:
        return [Plan("resident", gradient) for gradient in gradients]
    plans = [Plan(forward, gradient) for forward in forwards for gradient in gradients]
    # Beside a saved x, a weight of less than half its size is no burden.
    if wide and needs_dx and "dense" in gradients and n >= 2 * out_features:
        plans.append(Plan("saved", "dense"))
    if spectral_is_legal(in_features, out_features, k, dtype, device, singular_basis):
        plans.append(Plan("spectral", "two_sided" if needs_delta else "none"))
    return plans


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
