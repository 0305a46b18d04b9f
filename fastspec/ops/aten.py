"""The operators on ATen calls: every plan, every core, any device and floating dtype.

On a CPU csrc/spectral_linear.cpp computes the same and takes precedence where it is built, on CUDA
csrc/cuda_plans.cpp for the plans that look at no values. Products run in
the dtype of x (g); the weight may be wider (autocast): it is merged or cast here. The core is applied in
float32 at least. Section numbers F1 to F4 are those of the design notes (docs/design.md).
"""

from __future__ import annotations

import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from fastspec.cores import diagonals

# A direction with |sigma_i| below this share of the largest would have its rounding error amplified by
# more than 1/share on the short side: the call then takes the two-sided form. For a dense core the same
# bound stands on 1 / cond_1(diag(S) + C), which for a diagonal core is the same share.
SIGMA_FLOOR = 1e-2
# The rounding of y is that of the larger of x W^T and the bias. A bias whose part in U is above this many
# times (y - b) U would leave p = (y - b) U / sigma with fewer digits than x Vh^T has, which is taken then.
BIAS_CEILING = 2.0
_SAMPLED_ROWS = 128
# The forwards of one product with W_eff; where it is resident, that is the given weight.
ONE_PRODUCT = ("merged", "resident")


class _Scratch(threading.local):
    """One buffer per thread, device and dtype, as large as the largest weight that asked for it."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def take(self, rows: int, cols: int, like: Tensor) -> Tensor:
        if like.device.type != "cpu":
            # a caching allocator serves each stream its own memory; one shared buffer could not
            return like.new_empty(rows, cols)
        size = rows * cols
        buffer = self.buffers.get(like.dtype)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=like.dtype)
            self.buffers[like.dtype] = buffer
        return buffer[:size].view(rows, cols)

    def like(self, weight: Tensor) -> Tensor:
        """A buffer of the weight's shape, row-major or transposed as it is."""
        rows, cols = weight.shape
        if weight.stride(-1) == 1:
            return self.take(rows, cols, weight)
        return self.take(cols, rows, weight).mT


scratch = _Scratch()


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which the arithmetic of a core is done: the widest of theirs, float32 at least."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def apply_core(t: Tensor, delta: Tensor, core: str, *, transpose: bool = False) -> Tensor:
    """t C, or t C^T  [N, k], in the dtype of t; the arithmetic is in float32 at least."""
    wide = accumulation_dtype(t, delta)
    d, k = delta.to(wide), t.shape[-1]
    if core == "diag":
        out = t.to(wide) * d
    elif core == "dense":
        out = t.to(wide) @ (d.mT if transpose else d)
    else:
        out = torch.zeros_like(t, dtype=wide)
        for row, i, j in diagonals(d.shape[0], k):
            source, target = (j, i) if transpose else (i, j)
            out[:, target] += t[:, source] * d[row, i]
    return out.to(t.dtype)


def apply_sigma(
    t: Tensor, s: Tensor, delta: Tensor, core: str, *, transpose: bool = False
) -> Tensor:
    """t M, or t M^T  [N, k], with M = diag(S) + C."""
    if core == "diag":
        return t * (s + delta).to(t.dtype)
    return torch.addcmul(apply_core(t, delta, core, transpose=transpose), t, s.to(t.dtype))


def reduce_core(q: Tensor, p: Tensor, delta: Tensor, core: str) -> Tensor:
    """The trained entries of q^T p, in delta's shape and dtype; they are summed in float32 at least."""
    wide = accumulation_dtype(delta)
    q, p = q.to(wide), p.to(wide)
    if core == "diag":
        return (q * p).sum(0).to(delta.dtype)
    if core == "dense":
        return (q.mT @ p).to(delta.dtype)
    out = torch.zeros_like(delta)
    for row, i, j in diagonals(delta.shape[0], q.shape[-1]):
        out[row, i] = (q[:, i] * p[:, j]).sum(0).to(delta.dtype)
    return out


def merge(weight: Tensor, u: Tensor, vh: Tensor, delta: Tensor, core: str, out: Tensor) -> Tensor:
    """W + U C Vh into `out`, which has the weight's shape and row-major or transposed layout."""
    return add_product(weight, apply_core(u, delta, core), vh, out)


def add_product(weight: Tensor, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """W + L R into `out`, as `merge`."""
    if out.stride(-1) == 1:
        torch.addmm(weight, left, right, out=out)
    else:
        torch.addmm(weight.mT, right.mT, left.mT, out=out.mT)
    return out


def _effective(
    weight: Tensor, u: Tensor, vh: Tensor, delta: Tensor, core: str, forward: str
) -> Tensor:
    """W_eff in scratch (F2): valid until the next call on this thread takes the buffer."""
    if forward == "resident":
        return weight
    if weight.device.type == "cpu" and not delta.any():
        return weight  # the untouched weight: the first step is the pretrained model's bit for bit
    return merge(weight, u, vh, delta, core, scratch.like(weight))


def _sigma(s: Tensor, delta: Tensor, core: str) -> Tensor:
    """M = diag(S) + C: [k] for a diagonal core, else [k, k]."""
    return (s if core == "diag" else torch.diag(s)) + delta


def _unscaled(basis: Tensor, s: Tensor, delta: Tensor, core: str, *, left: bool) -> Tensor | None:
    """The basis [m, k] that turns a short-side product into the long side's projection (F3).

    With M = diag(S) + C:  p = (y - b) (U M^-T)  and  q = dx (V M^-1).  None where M is too close to
    singular for the identity to be exact to rounding.
    """
    m = _sigma(s, delta, core)
    if core == "diag":
        low, high = torch.aminmax(m.abs())
        return basis / m.to(basis.dtype) if low > SIGMA_FLOOR * high else None
    inverse, info = torch.linalg.inv_ex(m)
    cond = torch.linalg.matrix_norm(m, 1) * torch.linalg.matrix_norm(inverse, 1)
    if info.item() != 0 or not cond * SIGMA_FLOOR < 1:
        return None
    inverse = inverse.to(basis.dtype)
    return basis @ (inverse.mT if left else inverse)


def drowned(p: Tensor, u: Tensor, sigma: Tensor, bias: Tensor) -> bool:
    """Whether p [N, k], found from y - b, lacks digits because y's rounding is that of its bias [out].

    That rounding reaches direction i of (y - b) U = p M^T, M = `sigma` [k] or [k, k], as the root of
    sum_j (b_j U_ji)^2. Means of |p|: a few large rows would hide the others. Rows at equal distances stand
    for all.
    """
    if p.shape[0] == 0:
        return False
    noise = (u.square().mT @ bias.square()).sqrt()
    some = p[:: max(1, p.shape[0] // _SAMPLED_ROWS)]
    along = (sigma * some.abs().mean(0)).abs()
    signal = along if sigma.dim() == 1 else torch.linalg.vector_norm(along, dim=1)
    return not bool(noise.sum() <= BIAS_CEILING * signal.sum())


def spectral_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    delta: Tensor,
    core: str,
    forward: str,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """y [..., out] and p [N, k] (no rows where the plan saves none)."""
    out_features, in_features = weight.shape
    dtype = x.dtype
    saves_p = gradient in ("two_sided", "short")
    x2 = x.reshape(-1, in_features)

    p_from_y = gradient == "short" and out_features < in_features
    needs_p = forward not in ONE_PRODUCT or (saves_p and not p_from_y)
    p = x2 @ vh.to(dtype).mT if needs_p else None
    if p is None or forward in ONE_PRODUCT:
        y = F.linear(x, _effective(weight, u, vh, delta, core, forward).to(dtype), bias)
    elif forward == "factored" and x.is_cpu:
        y = F.linear(x, weight.to(dtype), bias)
        z = apply_core(p, delta, core, transpose=True)
        y.view(-1, out_features).addmm_(z, u.to(dtype).mT)
    elif forward == "factored":
        # the small correction is rounded on its way, not y; on a CPU the product alone starts a layer
        z, ut = apply_core(p, delta, core, transpose=True), u.to(dtype).mT
        y2 = z @ ut if bias is None else torch.addmm(bias, z, ut)
        y = y2.addmm_(x2, weight.to(dtype).mT).view(*x.shape[:-1], out_features)
    elif delta.any():
        y2 = apply_sigma(p, s, delta, core, transpose=True) @ u.mT
        y = y2.view(*x.shape[:-1], out_features)
        y = y if bias is None else y.add_(bias)
    else:
        y = F.linear(x, weight, bias)  # the first step is the pretrained model's bit for bit
    if not saves_p:
        return y, x.new_empty((0, u.shape[1]))
    if p is None:
        basis = _unscaled(u, s, delta, core, left=True)
        if basis is not None:
            p = y.view(-1, out_features) @ basis
            if bias is not None:
                p -= bias @ basis
        if p is None or (bias is not None and drowned(p, u, _sigma(s, delta, core), bias)):
            p = x2 @ vh.mT
    return y, p


def spectral_linear_backward(
    g: Tensor,
    x: Tensor | None,
    p: Tensor | None,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    delta: Tensor,
    core: str,
    forward: str,
    gradient: str,
    needs_dx: bool,
    needs_delta: bool,
) -> tuple[Tensor, Tensor]:
    """dx [..., in] and d delta in delta's shape; what is not needed comes back empty."""
    out_features, in_features = weight.shape
    dtype = g.dtype
    g2 = g.reshape(-1, out_features)
    q = dx2 = None

    if needs_dx:
        if forward == "spectral":
            q = g2 @ u
            dx2 = apply_sigma(q, s, delta, core) @ vh
        elif forward == "factored":
            q = g2 @ u.to(dtype)
            scaled = apply_core(q, delta, core)
            if g.is_cpu:
                dx2 = (g2 @ weight.to(dtype)).addmm_(scaled, vh.to(dtype))
            else:  # as in the forward
                dx2 = (scaled @ vh.to(dtype)).addmm_(g2, weight.to(dtype))
        else:
            dx2 = g2 @ _effective(weight, u, vh, delta, core, forward).to(dtype)
    dx = dx2.view(*g.shape[:-1], in_features) if dx2 is not None else g.new_empty(0)
    if not needs_delta:
        return dx, delta.new_empty(0)

    if gradient == "dense":
        assert x is not None
        return dx, _dense_gradient(g2, x.reshape(-1, in_features), u, vh, delta, core)
    assert p is not None
    if q is None and gradient == "short" and dx2 is not None and in_features < out_features:
        basis = _unscaled(vh.mT, s, delta, core, left=False)
        q = dx2 @ basis if basis is not None else None
    if q is None:
        q = g2 @ u.to(dtype)
    return dx, reduce_core(q, p, delta, core)


def _dense_gradient(
    g: Tensor, x: Tensor, u: Tensor, vh: Tensor, delta: Tensor, core: str
) -> Tensor:
    """Entries of U^T (g^T x) V (F4): one weight gradient, in scratch, serves every diagonal."""
    grad = scratch.take(g.shape[1], x.shape[1], g)
    torch.mm(g.mT, x, out=grad)
    rows = u.to(g.dtype).mT @ grad  # [k, in]
    vh = vh.to(g.dtype)
    if core == "dense":
        return (rows @ vh.mT).to(delta.dtype)
    # rows of U^T G against (shifted) rows of Vh: the same reduction, over `in` instead of tokens
    return reduce_core(rows.mT, vh.mT, delta, core)
