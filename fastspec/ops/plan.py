"""The cost model: which of the equivalent formulas runs a given call (design section 2, F2 to F5).

A plan is data. It is chosen for a `LayerCall`, which holds sizes and needs and no values, can be printed
(`layer.plan(n)`) and forced (`Plan("factored", "two_sided")`). `why_not` says which are legal; every legal
plan computes the same numbers up to rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch

from fastspec.kernels import MAX_RANK

Forward = Literal["merged", "saved", "resident", "factored", "spectral"]
Gradient = Literal["none", "two_sided", "short", "dense"]
FORWARDS: tuple[Forward, ...] = get_args(Forward)
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)
WIDE = (torch.float32, torch.float64)  # in 16 bits y, dx and a merged weight are rounded too far


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
class LayerCall:
    """One call of one layer, as far as the legality and the cost of a plan depend on it.

    Args:
        n: rows (tokens), counted after flattening leading dimensions.
        in_features, out_features, k: the layer's sizes.
        core: "diag", "band", "dense" or "low_rank".
        dtype: the dtype of the products.
        device: device type.
        needs_dx: whether the gradient of the input is wanted.
        needs_delta: whether the gradient of the coefficients is wanted.
        singular_basis: whether `W V = U S` holds to rounding, which the singular identities rest on.
        resident: whether the caller keeps W + U C Vh and gives it in the weight's place.
    """

    n: int
    in_features: int
    out_features: int
    k: int
    core: str = "diag"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    needs_dx: bool = True
    needs_delta: bool = True
    singular_basis: bool = True
    resident: bool = False


def why_not(plan: Plan, call: LayerCall) -> str | None:
    """Why `plan` may not compute `call`, and what to do; None where it may. All rules stand here.

    A plan's gradient is judged even where the call needs none and leaves it out.
    """
    forward, gradient = plan.forward, plan.gradient
    if call.needs_delta and gradient == "none":
        return "gradient='none', but delta requires a gradient: take 'two_sided'"
    if call.resident and forward != "resident":
        return "W + U C Vh is given in the weight's place: only forward='resident' takes it"
    if forward == "resident" and not call.resident:
        return "forward='resident' can't be forced: give `effective` instead"
    if call.core == "low_rank" and (
        forward in ("saved", "spectral") or gradient in ("short", "dense")
    ):
        return (
            "a low-rank core has thin factors of its own: take 'merged' or 'factored' and 'two_sided', got "
            f"{forward!r} and {gradient!r}"
        )
    if forward == "saved" and gradient != "dense":
        return (
            "forward='saved' saves a matrix as large as the weight: only beside gradient='dense', "
            f"which saves x, got gradient={gradient!r}"
        )
    if gradient != "short" and forward != "spectral":
        return None
    identity = call.singular_basis and call.dtype in WIDE
    if gradient == "short" and not (identity and call.core != "band"):
        return (
            "gradient='short' needs singular_basis=True, a diag or dense core, and float32 or float64, "
            f"got singular_basis={call.singular_basis}, core={call.core!r}, {call.dtype}: "
            "take 'two_sided'"
        )
    if forward != "spectral":
        return None
    if gradient not in ("none", "two_sided"):
        return "forward='spectral' has p and q at hand: gradient must be 'two_sided'"
    # the first step has to be the pretrained model's bit for bit: a GPU would wait for a look at delta
    short_side = min(call.in_features, call.out_features)
    if not (identity and call.k == short_side and call.device == "cpu"):
        return (
            "forward='spectral' needs a complete singular basis in float32 or float64 on a CPU, got "
            f"singular_basis={call.singular_basis}, k={call.k} of {short_side}, {call.dtype}, "
            f"{call.device}: take 'merged'"
        )
    return None


def legal_plans(call: LayerCall) -> list[Plan]:
    """Every plan that may compute `call`."""
    plans = (Plan(forward, gradient) for forward in FORWARDS for gradient in GRADIENTS)
    return [plan for plan in plans if why_not(plan, call) is None]


def weighed_plans(call: LayerCall) -> list[Plan]:
    """The legal plans that are worth weighing: among them is the best one, and there is always one."""
    is_wide = call.dtype in WIDE
    gradients: list[Gradient] = ["two_sided", "dense"] if call.needs_delta else ["none"]
    if call.needs_delta and call.device == "cuda" and call.k <= MAX_RANK:
        gradients = ["two_sided"]  # the projection rides along in the kernels, and x is not saved
    # a GPU would wait for its look at the values of sigma; on a square it saves nothing
    saves = call.in_features > call.out_features or (
        call.in_features < call.out_features and call.needs_dx
    )
    if call.needs_delta and saves and call.device == "cpu":
        gradients.append("short")
    # In 16 bits a merged weight rounds the coefficients away: the correction is added instead.
    forwards: list[Forward] = ["merged", "factored"] if is_wide else ["factored"]
    if call.resident:
        forwards = ["resident"]
    plans = [Plan(forward, gradient) for forward in forwards for gradient in gradients]
    # Beside a saved x, a weight of less than half its size is no burden.
    if is_wide and call.needs_dx and "dense" in gradients and call.n >= 2 * call.out_features:
        plans.append(Plan("saved", "dense"))
    plans.append(Plan("spectral", gradients[0]))
    return [plan for plan in plans if why_not(plan, call) is None]


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


def make_plan(call: LayerCall, costs: Costs = COSTS) -> Plan:
    """The cheapest legal plan for one call of a layer."""
    plans = weighed_plans(call)
    # torch.compile traces this, but no min() with a key
    best, least = plans[0], costs.of(work_of(plans[0], call), call.k)
    for plan in plans[1:]:
        if (this := costs.of(work_of(plan, call), call.k)) < least:
            best, least = plan, this
    return best


def work_of(plan: Plan, call: LayerCall) -> Work:
    """What `plan` adds in one forward and backward of the call (F2 to F4)."""
    forward, gradient = plan.forward, plan.gradient
    n, in_features, out_features, k = call.n, call.in_features, call.out_features, call.k
    needs_dx = call.needs_dx
    itemsize = 8 if call.dtype == torch.float64 else 4
    weight = in_features * out_features
    flops = thin = moved = 0
    one_product = forward in ("merged", "saved", "resident")
    if call.core == "low_rank":
        # passes over y and dx, or over the weight; the thin products are those of the gradient too
        wide = out_features + (in_features if needs_dx else 0)
        if forward == "merged":
            moved = 2 * weight * itemsize * (2 if needs_dx else 1)
        elif forward == "factored":
            moved = 2 * n * wide * itemsize
        return Work(0, 0, moved)

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
