"""The operator that keeps a layer's copy of W + U C Vh, in any floating dtype, on any device.

In 16 bits the sum can't be rounded to the nearest number: a shift below half a unit in W's last place
would vanish altogether. Each entry of the copy has a threshold of its own instead, the same for ever. It is
rounded up where what lies beyond the last bit exceeds the threshold, else down. With delta = 0 the copy is W
bit for bit, and over many entries the error averages to nothing. For one entry it stays below one unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastspec.ops import aten, cuda

torch.library.define(
    "fastspec::keep_merged",
    "(Tensor(a!) out, Tensor(b!) made_for, Tensor weight, Tensor u, Tensor vh, Tensor delta, str core,"
    " bool forced) -> ()",
)

CORES = ("diag", "dense")
BITS_BEYOND = {torch.bfloat16: 16, torch.float16: 13}  # of float32, that these have not


def thresholds(rows: int, columns: int, bits: int, device: torch.device | str = "cpu") -> Tensor:
    """The threshold of every entry: int64 [rows, columns], uniform in [0, 2**bits).

    The hash is `lowbias32` of the entry's place (https://nullprogram.com/blog/2018/07/31/).
    """
    h = torch.arange(rows * columns, device=device) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return ((h ^ (h >> 16)) & ((1 << bits) - 1)).view(rows, columns)


def round_by_threshold(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [rows, columns] in `dtype`, every entry rounded up or down by its threshold."""
    bits = BITS_BEYOND.get(dtype)
    if bits is None:
        return value.to(dtype)
    raised = value.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rows, columns = value.shape
    raised = (raised + thresholds(rows, columns, bits, value.device)) >> bits << bits
    rounded = (raised - ((raised >> 31) << 32)).to(torch.int32).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(dtype)


def _keep(
    out: Tensor,  # [out, in], the copy
    made_for: Tensor,  # as delta: the coefficients that the copy was made for
    weight: Tensor,  # [out, in]
    u: Tensor,  # [out, k]
    vh: Tensor,  # [k, in]
    delta: Tensor,
    core: str,
    forced: bool,  # made in any case; else only where delta differs from made_for
) -> None:
    # elsewhere the host would wait for the answer
    if not forced and weight.device.type == "cpu" and torch.equal(made_for, delta):
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    left = aten.apply_core(u, delta, core)
    total = torch.addmm(weight.to(wide), left.to(wide), vh.to(wide))
    out.copy_(round_by_threshold(total, weight.dtype))
    made_for.copy_(delta)


def _keep_on_cuda(
    out: Tensor,
    made_for: Tensor,
    weight: Tensor,
    u: Tensor,
    vh: Tensor,
    delta: Tensor,
    core: str,
    forced: bool,  # made in any case; else only where delta differs from made_for
) -> None:
    operands = (out, made_for, weight, u, vh, delta)
    served = weight.dtype in BITS_BEYOND and {u.dtype, vh.dtype} == {weight.dtype}
    if served and cuda.has_triton():
        from fastspec.kernels.kept import keep

        with torch.cuda.device_of(weight):
            keep(*operands, core, forced)
    else:
        _keep(*operands, core, forced)


torch.library.impl("fastspec::keep_merged", "CompositeExplicitAutograd", _keep)
torch.library.impl("fastspec::keep_merged", "CUDA", _keep_on_cuda)
keep_merged = torch.ops.fastspec.keep_merged.default
