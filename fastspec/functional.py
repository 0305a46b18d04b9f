"""The public function: validate once, cast, plan, call the operator."""

from __future__ import annotations

import functools
import math
from typing import TypeAlias

import torch
from torch import Tensor

from fastspec import aten, ops, reference
from fastspec.config import CORES
from fastspec.plan import Plan, make_plan, spectral_is_legal

# Of x, weight, bias, u, s, vh and delta; with sizes that torch.compile traces where it does.
Sizes: TypeAlias = tuple[
    torch.Size, torch.Size, torch.Size | None, torch.Size, torch.Size, torch.Size, torch.Size
]


def spectral_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    delta: Tensor,
    *,
    core: str = "diag",
    singular_basis: bool = False,
    plan: Plan | None = None,
    effective: Tensor | None = None,
) -> Tensor:
    """y = x (W + U C Vh)^T + b  with the core C stored in `delta` (arXiv 2605.07302).

    Args:
        x: [..., in]; leading dimensions of any number and size.
        weight: [out, in], frozen.
        bias: [out] or None.
        u, s, vh: frozen factors [out, k], [k], [k, in].
        delta: trained: [k] (core="diag"), [2h + 1, k] (core="band": C[i, i + o] = delta[h + o, i]) or
            [k, k] (core="dense"); float32 as a rule, also under 16-bit weights.
        core: "diag", "band" or "dense".
        singular_basis: promise that `W V = U S` holds to rounding, as `topk_svd` builds it and as long
            as nothing was cast since. Allows the short-side gradient (design section 2, F3).
        plan: forces a plan; None takes the cost model's. A plan that is not legal here (a short side
            without a singular basis) is refused.
        effective: W + U C Vh for this very `delta`, in float32 or float64, where the caller keeps it: it
            is then not made again. Excludes `plan`.

    Returns:
        [..., out], in the dtype of x (of autocast, where that is on).

    Gradients reach x, bias and delta. Where weight or a factor requires one too, and inside the transforms
    of torch.func (vmap, grad, jvp), the plain formula of `fastspec.reference` runs.

    Raises:
        ValueError, TypeError: a shape, dtype or choice does not fit; the message names the argument.
    """
    sizes = sizes_of(x, weight, bias, u, s, vh, delta.shape)
    if (
        weight.requires_grad
        or u.requires_grad
        or vh.requires_grad
        or torch._C._are_functorch_transforms_active()
    ):
        check_sizes(sizes, core)
        return reference.spectral_linear(x, weight, bias, u, vh, delta, core)
    x, bias = cast(x, weight, bias)
    if effective is not None:
        if plan is not None:
            raise ValueError("effective and plan exclude each other")
        if effective.shape != weight.shape or effective.dtype != weight.dtype:
            raise ValueError(
                f"effective must be {list(weight.shape)} in {weight.dtype} as the weight, got "
                f"{list(effective.shape)} in {effective.dtype}"
            )
    device = x.device.type
    needs_delta = delta.requires_grad and torch.is_grad_enabled()
    # sizes may be symbolic while torch.compile traces: then they can't be looked up
    choose = _plan_for if torch.compiler.is_compiling() else _known_plan
    chosen = choose(
        sizes,
        core,
        x.dtype,
        device,
        x.requires_grad,
        needs_delta,
        singular_basis,
        effective is not None,
    )
    if plan is None:
        plan = chosen
    else:
        _check_plan(plan, weight, u.shape[1], core, x.dtype, device, singular_basis)
    gradient = plan.gradient if needs_delta else "none"
    if needs_delta and gradient == "none":
        raise ValueError("plan.gradient is 'none' but delta requires a gradient")
    forward = plan.forward
    if forward == "saved":
        with torch.no_grad():
            effective = aten.merge(weight, u, vh, delta, core, torch.empty_like(weight))
        forward = "resident"
    if effective is not None:
        weight = effective
    return ops.spectral_linear(x, bias, weight, u, s, vh, delta, core, forward, gradient)


def _check_plan(
    plan: Plan,
    weight: Tensor,
    k: int,
    core: str,
    dtype: torch.dtype,
    device: str,
    singular_basis: bool,
) -> None:
    """Refuse a forced plan whose identities do not hold here."""
    if plan.forward == "resident":
        raise ValueError("plan.forward='resident' can't be forced: give `effective` instead")
    if plan.forward == "saved" and plan.gradient != "dense":
        raise ValueError(
            "plan.forward='saved' saves a matrix as large as the weight: only beside gradient='dense', "
            f"which saves x, got gradient={plan.gradient!r}"
        )
    if plan.gradient == "short" and not (singular_basis and core != "band"):
        raise ValueError(
            "plan.gradient='short' needs singular_basis=True and a diag or dense core: take 'two_sided'"
        )
    if plan.forward == "spectral":
        if not spectral_is_legal(
            weight.shape[1], weight.shape[0], k, dtype, device, singular_basis
        ):
            raise ValueError(
                "plan.forward='spectral' needs a complete singular basis in float32 or float64 on a "
                f"CPU, got k={k} of {min(weight.shape)}, {dtype}, {device}: take 'merged'"
            )
        if plan.gradient not in ("none", "two_sided"):
            raise ValueError(
                "plan.forward='spectral' has p and q at hand: gradient must be 'two_sided'"
            )


def delta_shape(core: str, k: int, half_width: int = 1) -> tuple[int, ...]:
    """The shape of the trained storage of a core of order k."""
    return {"diag": (k,), "band": (2 * half_width + 1, k), "dense": (k, k)}[core]


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
    if core not in CORES:
        raise ValueError(f"core must be one of {CORES}, got {core!r}")
    if len(weight) != 2 or len(u) != 2 or len(vh) != 2:
        raise ValueError("weight, u and vh must be matrices")
    (out_features, in_features), k = weight, u[1]
    if len(x) < 1 or x[-1] != in_features:
        raise ValueError(f"x must be [..., {in_features}] for this weight, got {tuple(x)}")
    if core == "band" and (len(delta) != 2 or delta[0] % 2 == 0 or delta[1] != k):
        raise ValueError(
            f"delta must be [2 * half_width + 1, {k}] for core='band', got {tuple(delta)}"
        )
    expected: list[tuple[str, torch.Size, tuple[int, ...]]] = [
        ("u", u, (out_features, k)),
        ("s", s, (k,)),
        ("vh", vh, (k, in_features)),
    ]
    if bias is not None:
        expected.append(("bias", bias, (out_features,)))
    if core != "band":
        expected.append(("delta", delta, delta_shape(core, k)))
    for name, given, wanted in expected:
        if given != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(given)}")


def _plan_for(
    sizes: Sizes,
    core: str,
    dtype: torch.dtype,
    device: str,
    needs_dx: bool,
    needs_delta: bool,
    singular_basis: bool,
    resident: bool,
) -> Plan:
    """The plan of operands of these sizes, which are checked before.

    Both in one, looked up by position: on a small layer (64 rows of 384 x 384) the checks, the plan and
    its keywords took 7 % of a step; the processor comes to them from a product, with cold caches.
    """
    check_sizes(sizes, core)
    x, weight, _, u, *_rest = sizes
    return make_plan(
        math.prod(x[:-1]),
        weight[1],
        weight[0],
        u[1],
        core=core,
        dtype=dtype,
        device=device,
        needs_dx=needs_dx,
        needs_delta=needs_delta,
        singular_basis=singular_basis,
        resident=resident,
    )


_known_plan = functools.lru_cache(4096)(_plan_for)
