"""W_eff = W + U C Vh for many layers of one shape in one launch.

One layer is well served by `addmm`; a model has dozens of equal ones, and launching each costs more
than writing it. The kernel finds the layers through tables of addresses, so nothing is stacked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastspec.cores import core_matrix
from fastspec.kernels import tiles
from fastspec.kernels.launch import launch
from fastspec.kernels.shift import at_address, shifted_tile
from fastspec.kernels.sigma_grad import dot_precision
from fastspec.kernels.spectral_linear import transposed

# ----------------------------------------------------------------------------------------- kernels


# fmt: off
@triton.jit
def merge_kernel(
    w_table,          # [L] int64 addresses of [OUT, IN]
    u_table,          # of [OUT, K]
    vh_table,         # of [K, IN]
    delta_table,      # of [K] float32; "diag" only
    out_table,        # of [OUT, IN], in the layout of W
    OUT, IN, K,
    stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi, stride_oo, stride_oi,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    CORE: tl.constexpr,  # "diag", or "none" where U holds U C already
    PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """out = W + U C Vh, for each layer."""
    layer = tl.program_id(2)
    w_ptr = at_address(w_table, layer, DTYPE, ALIGNED)
    u_ptr = at_address(u_table, layer, DTYPE, ALIGNED)
    vh_ptr = at_address(vh_table, layer, DTYPE, ALIGNED)
    out_ptr = at_address(out_table, layer, DTYPE, ALIGNED)
    delta_ptr = at_address(delta_table, layer, tl.float32, False)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (rows < OUT)[:, None]
    col_ok = (cols < IN)[None, :]
    merged = shifted_tile(
        w_ptr, u_ptr, vh_ptr, delta_ptr, rows, cols, row_ok, col_ok, K,
        stride_wo, stride_wi, stride_uo, stride_uk, stride_vk, stride_vi,
        CORE, PRECISION, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_R,
    )
    out_ptrs = out_ptr + rows[:, None] * stride_oo + cols[None, :] * stride_oi
    tl.store(out_ptrs, merged.to(DTYPE), mask=row_ok & col_ok)
# fmt: on


# --------------------------------------------------------------------------------------- launchers

ELEMENT = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
ADDRESS_TABLES = ("w_table", "u_table", "vh_table", "delta_table", "out_table")
# memory-bound: tiles wide enough for long rows; on scalar units shallow steps (tiles.py, rule 3)
TILES: dict[tiles.Kind, tiles.Tile] = {
    "16bit": tiles.Tile(64, 128, 32, 8, 2),
    "tf32": tiles.Tile(64, 128, 32, 8, 2),
    "fp32": tiles.Tile(64, 64, 16, 4, 2),
}


def merge(
    weights: Sequence[Tensor],  # each [out, in]
    us: Sequence[Tensor],  # [out, k]
    vhs: Sequence[Tensor],  # [k, in]
    deltas: Sequence[Tensor],
    core: str = "diag",
) -> list[Tensor]:  # each [out, in]
    """The effective weights of layers that share shapes, strides, dtype and device.

    Args:
        weights, us, vhs: float32, bfloat16 or float16; any strides, the same for every layer.
        deltas: float32 storage of each core: [k], [2h + 1, k] or [k, k].
        core: "diag", "band" or "dense"; for the last two U C is formed first, in float32. In 16 bits U C
            is rounded to them before the product with Vh.

    Returns:
        One new tensor a layer, row-major or, where W is, column-major; the sum is rounded once from
        float32.

    Raises:
        ValueError: layers differ in shape, strides, dtype or device, or the dtype has no kernel.
    """
    if not weights:
        return []
    if weights[0].dtype not in ELEMENT:
        raise ValueError(f"weights must be float32, bfloat16 or float16, got {weights[0].dtype}")
    if core != "diag":
        lefts = [torch.empty(u.shape, dtype=u.dtype, device=u.device) for u in us]
        for left, u, delta in zip(lefts, us, deltas, strict=True):
            left.copy_(u.float() @ core_matrix(delta.float(), core))  # U C, rounded once
        us = deltas = lefts  # as deltas only an address, which the kernel leaves alone
    outs = [_room_like(w) for w in weights]
    deltas = [d.contiguous() for d in deltas]
    operands = {"weights": weights, "us": us, "vhs": vhs, "deltas": deltas, "outs": outs}
    for name, tensors in operands.items():
        kinds = {(t.shape, t.stride(), t.dtype, t.device) for t in tensors}
        if len(kinds) != 1 or len(tensors) != len(weights):
            raise ValueError(
                f"{name}: every layer must have one, alike, got {len(tensors)}: {kinds}"
            )
    w, u, vh = weights[0], us[0], vhs[0]
    (out, d), k = w.shape, u.shape[1]
    addresses = torch.tensor([[t.data_ptr() for t in ts] for ts in operands.values()])
    tile = TILES[tiles.kind(w.dtype)]
    grid = (tiles.cdiv(d, tile.block_n), tiles.cdiv(out, tile.block_m), len(weights))
    if w.numel():
        with torch.cuda.device_of(w):
            launch(
                merge_kernel, grid,
                **dict(zip(ADDRESS_TABLES, _table(addresses, w.device), strict=True)),
                OUT=out, IN=d, K=k,
                stride_wo=w.stride(0), stride_wi=w.stride(1),
                stride_uo=u.stride(0), stride_uk=u.stride(1),
                stride_vk=vh.stride(0), stride_vi=vh.stride(1),
                stride_oo=outs[0].stride(0), stride_oi=outs[0].stride(1),
                DTYPE=ELEMENT[w.dtype], CORE="diag" if core == "diag" else "none",
                ALIGNED=not (addresses % 16).any().item(),
                PRECISION=dot_precision(w.dtype), TRANSPOSED=transposed(w.dtype, vh.stride(0)),
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=tile.block_k, **tile.options,
            )  # fmt: skip
    return outs


def merge_layers(
    weights: Sequence[Tensor],  # each [out, in]
    us: Sequence[Tensor],  # [out, k]
    vhs: Sequence[Tensor],  # [k, in]
    deltas: Sequence[Tensor],
    cores: Sequence[str],
) -> list[Tensor | None]:
    """`merge` for the layers of a whole model: one launch for each kind of layer.

    A kind is core, shapes, strides, dtype and device. None stands where the dtypes have no kernel.
    """
    kinds = defaultdict(list)
    operands = list(zip(weights, us, vhs, deltas, strict=True))
    for i, ((*matrices, delta), core) in enumerate(zip(operands, cores, strict=True)):
        if {t.dtype for t in matrices} == {weights[i].dtype} and delta.dtype == torch.float32:
            alike = [(t.shape, t.stride(), t.dtype, t.device) for t in (*matrices, delta)]
            kinds[core, tuple(alike)].append(i)
    merged: list[Tensor | None] = [None] * len(weights)
    for (core, _), members in kinds.items():
        if weights[members[0]].dtype in ELEMENT:
            ws, lefts, rights, cs = zip(*[operands[i] for i in members], strict=True)
            for i, effective in zip(members, merge(ws, lefts, rights, cs, core), strict=True):
                merged[i] = effective
    return merged


def _table(addresses: Tensor, device: torch.device) -> Tensor:
    """Addresses on the device, where nothing waits for them."""
    if device.type != "cuda":  # under the interpreter
        return addresses
    if torch.cuda.is_current_stream_capturing():
        return filled(addresses, device)
    return addresses.pin_memory().to(device, non_blocking=True)


def filled(addresses: Tensor, device: torch.device) -> Tensor:
    """A copy by a launch each: a CUDA graph would read the host's memory again when it is replayed."""
    cells = [torch.full((), address, device=device) for address in addresses.flatten().tolist()]
    return torch.stack(cells).view(addresses.shape)


def _room_like(w: Tensor) -> Tensor:
    """A new matrix of the shape of w, column-major where w is."""
    if w.stride(0) == 1 and w.stride(1) != 1:
        return torch.empty(w.mT.shape, dtype=w.dtype, device=w.device).mT
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)
