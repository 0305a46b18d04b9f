"""The operator that keeps a layer's copy of W + U C Vh, in any floating dtype, on any device.

In 16 bits the sum can't be rounded to the nearest number: a shift below half a unit in W's last place
would vanish altogether. Each entry of the copy has a threshold of its own instead, the same for ever. It is
rounded up where what lies beyond the last bit exceeds the threshold, else down. With delta = 0 the copy is W
bit for bit, and over many entries the error averages to nothing. For one entry it stays below one unit.

A copy may lie beside its factors and a copy of the bias (`Room`), so that one product makes a layer and its
projection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastspec.cores import hashed
from fastspec.ops import aten, cuda

torch.library.define(
    "fastspec::keep_merged",
    "(Tensor(a!) out, Tensor(b!) made_for, Tensor weight, Tensor u, Tensor vh, Tensor delta, str core,"
    " bool forced, Tensor? bias=None, Tensor(c!)? bias_out=None) -> ()",
)

CORES = ("diag", "dense")
BITS_BEYOND = {torch.bfloat16: 16, torch.float16: 13}  # of float32, that these have not


def thresholds(rows: int, columns: int, bits: int, device: torch.device | str = "cpu") -> Tensor:
    """The threshold of every entry: int64 [rows, columns], uniform in [0, 2**bits), hashed by its place."""
    return (hashed(rows * columns, device) & ((1 << bits) - 1)).view(rows, columns)


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
    bias: Tensor | None = None,  # [out]
    bias_out: Tensor | None = None,  # [out], a copy of it
) -> None:
    if bias is not None and bias_out is not None:
        bias_out.copy_(bias)
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
    forced: bool,
    bias: Tensor | None = None,
    bias_out: Tensor | None = None,
) -> None:
    operands = (out, made_for, weight, u, vh, delta, core, forced, bias, bias_out)
    if _kernel_serves(weight, u, vh, delta):
        from fastspec.kernels.kept import keep

        with torch.cuda.device_of(weight):
            keep(*operands)
    else:
        _keep(*operands)


def _kernel_serves(weight: Tensor, u: Tensor, vh: Tensor, delta: Tensor) -> bool:
    """Whether Triton's kernel takes operands that lie on a GPU."""
    alike = {u.dtype, vh.dtype} == {weight.dtype} and delta.dtype == torch.float32
    served = weight.dtype in BITS_BEYOND or weight.dtype == torch.float32
    return alike and served and cuda.has_triton()


torch.library.impl("fastspec::keep_merged", "CompositeExplicitAutograd", _keep)
torch.library.impl("fastspec::keep_merged", "CUDA", _keep_on_cuda)
keep_merged = torch.ops.fastspec.keep_merged.default

# out, made_for, weight, u, vh, delta, core, bias, bias_out, as the operator's
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, str, Tensor | None, Tensor | None]


def keep_together(layers: Sequence[Operands]) -> Callable[[], None]:
    """A function that keeps the copies of many layers, again and again, as the operator keeps one.

    On a GPU, but in float64, it is one launch for each kind of layer and one to end with. It then knows the
    operands by address: they must stay where they are. Making it copies to the device, which no CUDA graph
    takes.
    """
    by_device: dict[torch.device, list[Operands]] = {}
    others: list[Operands] = []
    for operands in layers:
        _, _, weight, u, vh, delta, *_ = operands
        on_gpu = weight.is_cuda and delta.is_contiguous() and _kernel_serves(weight, u, vh, delta)
        (by_device.setdefault(weight.device, []) if on_gpu else others).append(operands)
    calls: list[Callable[[], None]] = []
    if by_device:
        from fastspec.kernels.kept import Tables

        calls = [Tables(members).launch for members in by_device.values()]

    def keep() -> None:
        for call in calls:
            call()
        for *operands, bias, bias_out in others:
            keep_merged(*operands, False, bias, bias_out)

    return keep


@dataclasses.dataclass(frozen=True)
class Room:
    """Memory for a copy [out, in], and what lies beside it in the same storage, where anything does.

    csrc/cuda_joined.h says how, and takes them from their places.
    """

    effective: Tensor  # [out, in]
    u: Tensor | None = None  # [out, k]
    vh: Tensor | None = None  # [k, in]
    bias: Tensor | None = None  # [out]

    @classmethod
    def like(cls, weight: Tensor, bias: Tensor | None, u: Tensor, vh: Tensor) -> Room:
        """Room for a copy of `weight` [out, in], beside its factors where csrc/ takes them there."""
        if not joins(weight, bias, u, vh):
            return cls(torch.empty_like(weight))
        (out, columns), k = weight.shape, u.shape[1]
        wide = padded(k)
        # rows on 32 bytes: Triton tells sizes by whether 16 divides them
        rows, row = out + wide, padded(columns + wide, 16)
        storage = weight.new_zeros(rows * row + (0 if bias is None else rows))
        matrix = storage[: rows * row].view(rows, row)
        matrix[:out, columns : columns + k].copy_(u)
        matrix[out : out + k, :columns].copy_(vh)
        beside = matrix[:out, columns : columns + k], matrix[out : out + k, :columns]
        of_bias = None if bias is None else storage[rows * row :][:out]
        return cls(matrix[:out, :columns], *beside, of_bias)


def padded(size: int, to: int = 8) -> int:
    """The next multiple; of 8 in 16 bits are 16 bytes."""
    return -(-size // to) * to


def joins(weight: Tensor, bias: Tensor | None, u: Tensor, vh: Tensor) -> bool:
    """Whether a copy of `weight` is worth laying out beside its factors: csrc/ takes it from there, on a GPU.

    A trained bias has a gradient, so it stays itself.
    """
    operands = [weight, u, vh, *([] if bias is None else [bias])]
    return (
        cuda.joins_products(weight.device)
        and weight.dtype in BITS_BEYOND
        and all(type(t.data) is Tensor and t.dtype == weight.dtype for t in operands)
        and weight.stride(1) == 1
        and not any(size % 8 for size in weight.shape)
        and not (bias is not None and bias.requires_grad)
    )
