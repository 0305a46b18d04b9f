"""Tile sizes by architecture and arithmetic, and the rule that picks one.

The rule, and why:

1. BLOCK_M follows the rows: 128 fills a warpgroup's 64-row matrix instruction twice, so that every
   tile of W fetched serves many rows; with few rows (decoding) 16 is the smallest tile the matrix
   units take, and bytes of W, not flops, set the time.
2. The float32 accumulators of the output tile and of the projection live in registers together:
   BLOCK_N + BLOCK_R is bounded (`COLUMNS`), so a wide rank narrows the output tile.
3. float32 without TF32 runs on the scalar units, which take whole operands of a step from registers:
   shallow steps, and no projection beside the output tile (`FUSED_RANK`); it is computed beforehand.
4. Stages are as many as the table asks and shared memory allows, counting the third tile, V or U, that
   rides along in the pipeline (`fit_stages`).
5. Output columns are spread over as many programs as make the whole launch shortest: each repeats the thin
   projection, and a wave that is not full takes as long as a full one (`split_columns`). With few rows the
   tile narrows too where that leaves fewer multiprocessors idle (`fill`).
6. Operands that are not `aligned` come one element at a time, each with an address and a mask in registers:
   in a large tile they spill, and the assembler of Triton 3.6 (ptxas 12.8) then loses a descriptor of
   `wgmma`. Small tiles by `mma.sync`, which reads registers, have neither fault (`UNALIGNED`).

The tiles of the TMA kernels in 16 bits were chosen by measurement (`choose_tma_tile`). The others follow
from these limits and from the compiler's register and shared-memory figures (docs/kernels.md).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import torch

from fastspec.precision import allows_tf32


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one architecture: bytes of shared memory a block may have and a multiprocessor holds,
    registers, warps; multiprocessors and peak figures of its largest part, for the report only."""

    name: str
    block_shared: int  # bytes
    sm_shared: int  # bytes
    multiprocessors: int
    tflops_16bit: float  # dense bf16/fp16, TFLOP/s
    tflops_fp32: float  # scalar units, TFLOP/s
    bandwidth: float  # TB/s
    sm_registers: int = 65536
    sm_warps: int = 64


# CUDA C++ programming guide, technical specifications per compute capability; peaks: A100-SXM 80 GB,
# H100-SXM and B200 data sheets, without sparsity.
CHIPS = {
    80: Chip("A100", 163 * 1024, 164 * 1024, 108, 312.0, 19.5, 2.04),
    90: Chip("H100", 227 * 1024, 228 * 1024, 132, 989.0, 67.0, 3.35),
    100: Chip("B200", 227 * 1024, 228 * 1024, 148, 2250.0, 80.0, 8.0),
}
SMALL_CHIP = Chip("other", 99 * 1024, 100 * 1024, 80, 0.0, 0.0, 0.0, sm_warps=48)  # sm_86, 89, 120


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of one program: rows, output columns, depth of a step; warps; pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int, block_r: int) -> int:
        """Bytes that the pipeline's stages of A, B and V take; without layout padding."""
        step = self.block_m + self.block_n + block_r
        return self.num_stages * step * self.block_k * itemsize

    def blocks(self, block_r: int) -> dict[str, int]:
        """The sizes as the tile programs' constants, beside a projection of `block_r` columns."""
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return {**sizes, "BLOCK_R": block_r}

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told beside the constants."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


Kind = Literal["16bit", "tf32", "fp32"]

# by generation, kind of arithmetic, few rows: the largest tile that rules 2 and 3 allow
TABLE = {
    ("ampere", "16bit", False): Tile(128, 128, 32, 8, 3),
    ("hopper", "16bit", False): Tile(128, 128, 64, 8, 3),
    ("blackwell", "16bit", False): Tile(128, 128, 64, 8, 3),
    ("ampere", "tf32", False): Tile(128, 64, 32, 8, 3),
    ("hopper", "tf32", False): Tile(128, 64, 32, 8, 3),
    ("blackwell", "tf32", False): Tile(128, 64, 32, 8, 2),
    ("ampere", "fp32", False): Tile(128, 64, 16, 8, 3),
    ("hopper", "fp32", False): Tile(128, 64, 16, 8, 3),
    ("blackwell", "fp32", False): Tile(128, 64, 16, 8, 3),
    **{(g, "16bit", True): Tile(16, 64, 64, 4, 4) for g in ("ampere", "hopper", "blackwell")},
    **{(g, "tf32", True): Tile(16, 64, 32, 4, 3) for g in ("ampere", "hopper", "blackwell")},
    **{(g, "fp32", True): Tile(16, 64, 16, 4, 3) for g in ("ampere", "hopper", "blackwell")},
}
UNALIGNED: dict[Kind, Tile] = {
    "16bit": Tile(32, 32, 32, 8, 3),
    "tf32": Tile(32, 32, 32, 8, 1),
    "fp32": Tile(32, 64, 16, 8, 3),
}
FEW_ROWS = 32
NARROWEST = 32  # columns of an output tile
DEEP = 2048  # steps of the sum from which a wide tile pays
MANY_ROWS = 4096  # what a number of rows that nobody knows yet is taken for
COLUMNS = 160  # of 128 rows in 8 warps: 80 registers a thread hold accumulators
FUSED_RANK: dict[Kind, int] = {"16bit": 64, "tf32": 32, "fp32": 0}

# Projections alone are bound by memory: few rows a program for many programs; block_n is the rank tile.
PROJECT: dict[Kind, Tile] = {
    "16bit": Tile(32, 64, 128, 4, 4),
    "tf32": Tile(32, 64, 64, 4, 3),
    "fp32": Tile(32, 64, 16, 4, 3),
}


def kind(dtype: torch.dtype) -> Kind:
    """The arithmetic of a dtype's products: float32 takes TF32 only where PyTorch's own may."""
    if dtype.itemsize == 2:
        return "16bit"
    return "tf32" if allows_tf32() else "fp32"


def generation(capability: int) -> str:
    """The table's row for a compute capability such as 90; 12x has the matrix instruction of 8x."""
    if 90 <= capability < 100:
        return "hopper"
    return "blackwell" if 100 <= capability < 120 else "ampere"


def chip(capability: int) -> Chip:
    """Limits of a compute capability; those of the smaller parts where it is not in the table."""
    return CHIPS.get(capability, CHIPS[100] if 100 <= capability < 120 else SMALL_CHIP)


def fit_stages(tile: Tile, itemsize: int, block_r: int, limit: int) -> Tile:
    """The tile with as many stages, up to its own, as `limit` bytes of shared memory carry."""
    while tile.num_stages > 1 and tile.shared_bytes(itemsize, block_r) > limit:
        tile = dataclasses.replace(tile, num_stages=tile.num_stages - 1)
    return tile


def choose_tile(
    capability: int, kind: Kind, n_rows: int, block_r: int, unaligned: bool = False
) -> Tile:
    """The tile for `n_rows` rows beside a projection of `block_r` columns (0: none) on this architecture.

    `unaligned`: some large operand is not `aligned`.
    """
    if unaligned:
        return UNALIGNED[kind]
    return _choose_tile(capability, kind, bool(n_rows <= FEW_ROWS), block_r)


@functools.lru_cache(4096)
def choose_tma_tile(
    capability: int,
    kind: Kind,
    n: int,
    columns: int,
    depth: int,
    block_r: int,
    multiprocessors: int,
) -> Tile:
    """The tile of a program that makes one output tile by TMA, beside a projection of `block_r` columns.

    The hardware keeps the addresses, and the registers they leave are enough for a full output tile. The
    rule in 16 bits is what the step `tune` of bench/gpu measured on an H200 (docs/gpu.md): small tiles where
    larger ones would leave multiprocessors idle; of 128 x 128 two share a multiprocessor, and one hides the
    other's start and end; a deep product prefers the wider tile, whose operands are read less often.
    """
    few = n <= FEW_ROWS
    tile = TABLE[generation(capability), kind, few]
    if kind == "16bit" and not few and capability >= 90:
        if cdiv(n, 128) * cdiv(columns, 128) < multiprocessors:
            tile = Tile(64, 64, 64, 4, 4)
        elif depth >= DEEP:
            tile = Tile(128, 256, 64, 8, 4)
        else:  # four warps have no registers for the widest rank
            tile = Tile(128, 128, 64, 4 if block_r <= 32 else 8, 3)
    return fit_stages(tile, _itemsize(kind), block_r, chip(capability).block_shared)


@functools.cache
def _choose_tile(capability: int, kind: Kind, few: bool, block_r: int) -> Tile:
    tile = TABLE[generation(capability), kind, few]
    if tile.block_n + block_r > COLUMNS:
        tile = dataclasses.replace(tile, block_n=tile.block_n // 2)
    return fit_stages(tile, _itemsize(kind), block_r, chip(capability).block_shared)


@functools.cache
def project_tile(capability: int, kind: Kind, block_r: int) -> Tile:
    """The tile for a projection alone onto `block_r` columns at a time."""
    tile = dataclasses.replace(PROJECT[kind], block_n=block_r)
    if kind != "fp32" and generation(capability) != "ampere":
        # with four, ptxas trims registers for one block more and spills: for some sizes in every Triton
        tile = dataclasses.replace(tile, num_warps=8)
    return fit_stages(tile, _itemsize(kind), 0, chip(capability).block_shared)


def _itemsize(kind: Kind) -> int:
    return 2 if kind == "16bit" else 4


@functools.cache
def capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def aligned(*operands: torch.Tensor) -> bool:
    """Whether Triton loads these 16 bytes at a time: it looks for strides in multiples of 16 elements."""
    return all(
        all(stride == 1 or hint(stride) % 16 == 0 for stride in t.stride())
        and hint(t.storage_offset()) * t.element_size() % 16 == 0
        for t in operands
    )


def cdiv(n: int, size: int) -> int:
    """Tiles of `size` that cover n; `triton.cdiv` costs the host ten times as much."""
    return (n + size - 1) // size


def hint(n: int) -> int:
    """A size where it decides nothing but speed: a symbolic one, of a compiled dynamic shape, by its hint."""
    return n if isinstance(n, int) else n.node.hint or MANY_ROWS


def tile_times(
    row_tiles: int, column_tiles: int, each: int, projection: float, slots: int
) -> float:
    """The length of a launch in times of one output tile: waves x (tiles each + projection).

    Args:
        each: output tiles that one program walks.
        projection: what a program's projection costs, in output tiles.
        slots: programs at work at once: multiprocessors times those resident on one.
    """
    waves = cdiv(row_tiles * cdiv(column_tiles, each), slots)
    return waves * (each + projection)


def split_columns(row_tiles: int, column_tiles: int, projection: float, slots: int) -> int:
    """Output tiles that one program walks, so that `tile_times` is least; of equals, the most."""
    splits = range(1, max(1, column_tiles) + 1)
    each = sorted({cdiv(max(1, column_tiles), split) for split in splits}, reverse=True)
    return min(each, key=lambda e: tile_times(row_tiles, column_tiles, e, projection, slots))


@functools.lru_cache(4096)
def fill(
    tile: Tile, n: int, columns: int, block_r: int, multiprocessors: int, narrow: bool
) -> tuple[Tile, int]:
    """The tile, and the output tiles that one program walks, for `n` rows and so many columns.

    With `narrow` the tile may lose columns where rows are few and that shortens the launch. A product's
    programs share a multiprocessor's matrix units: two resident take twice as long, so that slots are
    multiprocessors. `block_r` is 0 where no projection is computed beside.
    """
    widths = [tile.block_n]
    while narrow and tile.block_m <= FEW_ROWS and widths[-1] > NARROWEST:
        widths.append(widths[-1] // 2)
    found = []
    for width in widths:
        shape = (cdiv(n, tile.block_m), cdiv(columns, width))
        each = split_columns(*shape, block_r / width, multiprocessors)
        found.append(
            (width * tile_times(*shape, each, block_r / width, multiprocessors), width, each)
        )
    _, width, each = min(found, key=lambda one: one[0])  # of equals the widest
    return dataclasses.replace(tile, block_n=width), each
