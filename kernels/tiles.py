"""Tile sizes by architecture, and the rule that picks one.

The rule, and why:

1. BLOCK_M follows the rows: 128 fills a warpgroup's 64-row matrix instruction twice, so that every
   tile of W fetched serves many rows; with few rows (decoding) 16 is the smallest tile the matrix
   units take, and bytes of W, not flops, set the time.
2. BLOCK_N by BLOCK_K is what the chip's shared memory and registers carry for the element size: the
   float32 accumulators (BLOCK_N + BLOCK_R columns) must leave registers free for addresses, and
   float32 inputs without TF32 run on the scalar units, whose operands also sit in registers.
3. Stages are as many as the table asks and shared memory allows, since a third tile, V or U, rides
   along in the pipeline: `fit_stages` counts it.
4. `split_columns` gives every multiprocessor work: few row tiles spread their output columns over
   more programs, each of which repeats the (thin) projection.

Nothing here was timed on a GPU: the sizes follow from the limits above and from the compiler's own
register and shared-memory figures (docs/kernels.md).
"""

from __future__ import annotations

import dataclasses

import torch


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


# (generation, bytes an element, few rows): the largest tile that rule 2 allows
TABLE = {
    ("ampere", 2, False): Tile(128, 128, 32, 8, 4),
    ("ampere", 2, True): Tile(16, 64, 128, 4, 4),
    ("ampere", 4, False): Tile(64, 64, 16, 4, 3),
    ("ampere", 4, True): Tile(16, 64, 32, 4, 3),
    ("hopper", 2, False): Tile(128, 128, 64, 8, 3),
    ("hopper", 2, True): Tile(16, 64, 128, 4, 4),
    ("hopper", 4, False): Tile(64, 64, 16, 4, 3),
    ("hopper", 4, True): Tile(16, 64, 32, 4, 3),
    ("blackwell", 2, False): Tile(128, 128, 64, 8, 3),
    ("blackwell", 2, True): Tile(16, 64, 128, 4, 4),
    ("blackwell", 4, False): Tile(64, 64, 16, 4, 3),
    ("blackwell", 4, True): Tile(16, 64, 32, 4, 3),
}
FEW_ROWS = 32


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


def choose_tile(capability: int, dtype: torch.dtype, n_rows: int, block_r: int) -> Tile:
    """The tile for `n_rows` rows and a rank tile of `block_r` columns on this architecture."""
    key = (generation(capability), dtype.itemsize, n_rows <= FEW_ROWS)
    return fit_stages(TABLE[key], dtype.itemsize, block_r, chip(capability).block_shared)


def capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_columns(row_tiles: int, column_tiles: int, multiprocessors: int) -> int:
    """Output tiles that one program walks: few enough that all multiprocessors have a program.

    A whole row of tiles where the row tiles alone fill the device: the projection is then done once.
    """
    programs = max(1, -(-multiprocessors // max(1, row_tiles)))  # wanted per row tile
    return max(1, column_tiles // programs)
