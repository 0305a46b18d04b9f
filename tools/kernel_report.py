"""What the compiler makes of every kernel on every chip:  python tools/kernel_report.py

Prints Markdown: registers, spills, shared memory, occupancy, matrix instruction and width of loads at
the default tiles, then the roofline of typical layers. Compiles ahead of time; no GPU takes part.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from compilation import TYPE_NAMES, Compiled, compile_kernel

from fastspec.kernels import arrival, kept, merge, reduce, sigma_grad, tile_program, tiles, tma

CAPABILITIES = (80, 90, 100)
KINDS: dict[tiles.Kind, tuple[torch.dtype, ...]] = {
    "16bit": (torch.bfloat16, torch.float16),
    "tf32": (torch.float32,),
    "fp32": (torch.float32,),
}
MANY, FEW = 4096, 16  # rows: which of the table's tiles
# output columns and depth of TMA launches: one that fills no chip, a shallow one, a deep one
TMA_SIZES = ((384, 384), (3072, 768), (4096, 4096))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time constants, as the launchers would choose them on one chip."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    tile: tiles.Tile
    descriptors: dict[str, tuple[int, int]] | None = None
    loads_tiles: bool = True  # False: a reduction of vectors, whose loads need not be wide
    aligned: bool = True

    def compile(self, capability: int, dtype: torch.dtype) -> Compiled:
        options = self.tile.options
        return compile_kernel(
            self.kernel, self.constants, capability, dtype, options, self.descriptors, self.aligned
        )


def variants(capability: int, kind: tiles.Kind) -> Iterator[Variant]:
    """Every kernel that the launchers may start on this chip with this arithmetic."""
    constants: dict[str, Any]
    precision = "tf32" if kind == "tf32" else "ieee"
    dtype = KINDS[kind][0]
    fused = tiles.FUSED_RANK[kind]
    ranks = [r for r in (32, 64) if r <= fused]
    plain = [(core, r, MANY, False) for r in ranks for core in ("diag", "task", "dense")]
    few = ("diag", ranks[0]) if ranks else ("precomputed", 64)
    plain += [(*few, FEW, narrow) for narrow in (False, True)]
    plain.append(("precomputed", 64, MANY, False))
    for core, rank, rows, narrow in plain:
        # what `launch_grid` does: a rank in chunks goes by the step of the depth
        tile = tiles.choose_tile(capability, kind, rows, 0 if core == "precomputed" else rank)
        if narrow:
            tile = dataclasses.replace(tile, block_n=tiles.NARROWEST)
        block_r = tile.block_k if core == "precomputed" else rank
        label = f"{core}, " + ("rank in chunks" if core == "precomputed" else f"rank tile {rank}")
        label += "" if rows == MANY else ", few rows" + ", narrow" * narrow
        own: dict[str, dict[str, Any]] = {
            "fwd": {"BIAS": True, "TRANSPOSED": False, "stride_xi": 1},
            "bwd": {"GRAD": core != "precomputed", "TRANSPOSED": kind == "tf32", "stride_go": 1},
        }
        for direction, constants in own.items():
            constants |= {"stride_wi": 1, "stride_uk": 1, "stride_vi": 1, **tile.blocks(block_r)}
            constants |= {"CORE": core, "PRECISION": precision, "WIDE": False}
            kernel = getattr(tile_program, f"spectral_linear_{direction}_kernel")
            yield Variant(f"{direction}: {label}", kernel, constants, tile)
    if capability >= 90:
        for rank in ranks:
            for core in ("diag", "task", "dense"):
                for columns, depth in TMA_SIZES if kind == "16bit" else TMA_SIZES[-1:]:
                    sizes = (
                        MANY // 2,
                        columns,
                        depth,
                        rank,
                        tiles.chip(capability).multiprocessors,
                    )
                    tile = tiles.choose_tma_tile(capability, kind, *sizes)
                    yield from _tma_variants(core, rank, tile, precision)
    tile = tiles.project_tile(capability, kind, 64)
    for core in ("store", "diag", "task", *(["dense"] if fused >= 64 else [])):
        constants = {"stride_ad": 1, "stride_vk": 1, "CORE": core, "PRECISION": precision}
        if core == "store":  # x Vh^T: the factor's transpose
            del constants["stride_vk"]
            constants["stride_vd"] = 1
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_R": tile.block_n, "BLOCK_D": tile.block_k}
        name = "project" if core == "store" else f"sigma_grad: {core}"
        yield Variant(name, sigma_grad.project_kernel, constants, tile)
    constants = {"BLOCK_M": 64, "BLOCK_R": 32}
    rows_tile = tiles.Tile(64, 32, 0, 4, 3)
    kernel = sigma_grad.sum_by_task_kernel
    yield Variant("sigma_grad: rows by task", kernel, constants, rows_tile, loads_tiles=False)
    constants = {"stride_wi": 1, "stride_uk": 1, "stride_vi": 1, "stride_oi": 1}
    constants |= {"DTYPE": merge.ELEMENT[dtype], "CORE": "diag", "ALIGNED": True}
    constants |= {"PRECISION": precision, "TRANSPOSED": kind == "tf32"}
    tile = merge.TILES[kind]
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_R": tile.block_k}
    yield Variant("merge", merge.merge_kernel, constants, tile)
    tile = tiles.Tile(reduce.AT_ONCE // 32, 32, 0, 4, 3)
    constants = {**arrival.blocks(32), "SLOTS": reduce.MOST_PROGRAMS, "BLOCK_M": tile.block_m}
    yield Variant("reduce: k 32", reduce.reduce_kernel, constants, tile, loads_tiles=False)
    if kind == "tf32":  # copies have none
        return
    sides = {"stride_wi": 1, "stride_uk": 1, "stride_vi": 1, "stride_oi": 1, "CELLS": 32}
    tile = merge.TILES[kind]
    sides |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_R": tile.block_k}
    for core in ("diag", "dense"):
        constants = {**sides, "CORE": core, "BIAS": False}
        yield Variant(f"keep: one layer, {core}", kept.keep_kernel, constants, tile)
        addresses = {"DTYPE": merge.ELEMENT[dtype], "ALIGNED": True, "BIAS": True}
        kernel = kept.keep_all_kernel
        yield Variant(f"keep: all layers, {core}", kernel, constants | addresses, tile)


def _tma_variants(core: str, rank: int, tile: tiles.Tile, precision: str) -> Iterator[Variant]:
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    constants: dict[str, Any] = {"CORE": core, "PRECISION": precision, "GROUP": tma.GROUP}
    constants |= tile.blocks(rank)
    label = f"tma {m}x{n}, {core}, rank tile {rank}"
    forward = {"x_desc": (m, k), "w_desc": (n, k), "u_desc": (n, rank), "vh_desc": (rank, k)}
    kernel = tma.spectral_linear_fwd_tma_kernel
    blocks = {**forward, "y_desc": (m, n)}
    yield Variant(f"fwd: {label}", kernel, {**constants, "BIAS": True}, tile, blocks)
    backward = {"g_desc": (m, k), "w_desc": (k, n), "u_desc": (k, rank), "vh_desc": (rank, n)}
    kernel = tma.spectral_linear_bwd_tma_kernel
    blocks = {**backward, "dx_desc": (m, n)}
    summed = core != "task"
    constants |= {"GRAD": True, "SUMMED": summed}
    constants |= arrival.blocks({"diag": rank, "task": 1, "dense": rank * rank}[core])
    yield Variant(f"bwd: {label}", kernel, constants, tile, blocks)


# ------------------------------------------------------------------------------------------ output

# (what, rows, in, out, rank)
SHAPES = [
    ("MiniLM 384, GLUE 32x128", 4096, 384, 384, 32),
    ("MiniLM 384->1536, GLUE 32x128", 4096, 384, 1536, 32),
    ("BERT-base 768, GLUE 32x128", 4096, 768, 768, 32),
    ("BERT-base 768->3072, GLUE 32x128", 4096, 768, 3072, 32),
    ("BERT-base 3072->768, GLUE 32x128", 4096, 3072, 768, 32),
    ("LLM 4096, 2x2048", 4096, 4096, 4096, 64),
    ("LLM 4096->14336, 2x2048", 4096, 4096, 14336, 64),
    ("LLM 4096, decoding 8 rows", 8, 4096, 4096, 64),
]


def work(n: int, d: int, out: int, k: int, itemsize: int) -> tuple[float, float, float]:
    """(flops, bytes, flops of the frozen layer) of the forward, each operand moved once.

    The backward with the coefficient gradient has the same products with in and out exchanged, and
    reads p where the forward writes it.
    """
    frozen = 2.0 * n * d * out
    flops = frozen + 2.0 * n * k * (d + out)
    moved = itemsize * (n * d + out * d + n * out + k * (d + out) + n * k)
    return flops, moved, frozen


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def compiled_table(capability: int, kind: tiles.Kind) -> str:
    chip = tiles.chip(capability)
    rows = []
    for variant in variants(capability, kind):
        for dtype in KINDS[kind]:
            c = variant.compile(capability, dtype)
            t = variant.tile
            sizes = f"{t.block_m}x{t.block_n}x{t.block_k}, {t.num_warps}w {t.num_stages}s"
            loads = f"{c.bulk_loads} / {c.wide_loads} / {c.narrow_copies}"
            use = [c.registers, c.spills, f"{c.shared / 1024:.0f}", f"{c.occupancy(chip):.0%}"]
            rows.append([variant.name, TYPE_NAMES[dtype], sizes, *use, c.instruction, loads])
    header = ["kernel", "dtype", "tile", "registers", "spills, B", "shared, KB"]
    return table([*header, "occupancy", "instruction", "bulk / 16 B / narrow"], rows)


def roofline_table(capability: int) -> str:
    chip = tiles.chip(capability)
    rows = []
    for what, n, d, out, k in SHAPES:
        flops, moved, frozen = work(n, d, out, k, 2)
        by_flops = flops / chip.tflops_16bit * 1e-6  # us
        by_bytes = moved / chip.bandwidth * 1e-6
        bound = "flops" if by_flops > by_bytes else "bytes"
        size = [f"{flops / 1e9:.2f}", f"{moved / 1e6:.1f}", f"{flops / moved:.0f}"]
        least = f"{max(by_flops, by_bytes):.1f}"
        rows.append([what, k, *size, least, bound, f"{flops / frozen:.3f}"])
    header = ["layer", "k", "GFLOP", "MB", "flop/B", "least time, us", "bound by", "flops / frozen"]
    return table(header, rows)


PREFACE = """# What the compiler makes of the kernels

Generated by `python tools/kernel_report.py > docs/kernels.md` with Triton {triton}. Compiled ahead
of time for the default tiles (`kernels/tiles.py`), aligned row-major operands. What a card made of them
stands in [gpu.md](gpu.md).

- *spills*: bytes of local memory a thread, from the cubin. *occupancy*: theoretical, from registers,
  shared memory and warps.
- *bulk / 16 B / narrow*: tile fetches by TMA, 16-byte loads or asynchronous copies, and
  asynchronous copies of less, as counted in the PTX (places in the code, not executions).
- Arithmetic: *16bit* is bf16 and fp16 with float32 accumulation; *tf32* is float32 where
  `torch.backends.cuda.matmul.allow_tf32` is set; *fp32* is float32 otherwise, on the scalar units.

Where a chip's newest matrix instruction is not what the table shows, the reason:

- fp32 has no matrix instruction on any of these chips: `fma`.
- Tiles of 16 rows (few rows, decoding) and projections alone (32 rows) are below the 64 rows that one
  `wgmma` and the 64 or 128 that one `tcgen05.mma` take: `mma.sync`. These are bound by bytes, not flops.

`wgmma` and `tcgen05` read 4-byte operands with the depth contiguous only. In a tf32 backward the row-major W
runs the other way: it comes by 16-byte copies all the same, and passes through registers to be transposed.

Narrow copies move tiles that hold less than 16 bytes a thread (V at rank tile 32 on sm_80: 8 bytes).
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/kernel_report.py", description=__doc__)
    parser.add_argument("--capability", type=int, action="append", help="default: 80, 90, 100")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    print(PREFACE.format(triton=triton.__version__))
    for capability in args.capability or CAPABILITIES:
        print(f"## sm_{capability} ({tiles.chip(capability).name})\n")
        for kind in KINDS:
            print(f"### {kind}\n\n{compiled_table(capability, kind)}\n", flush=True)
        print(
            "### Roofline, 16 bits, forward (the backward moves the same)\n\n"
            f"{roofline_table(capability)}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
