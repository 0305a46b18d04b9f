"""Every kernel compiles for every chip without a GPU, and the machine code is what the design asks for."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys

import kernel_report as report
import pytest
import torch
from compilation import TYPE_NAMES, compile_kernel, undefined_reads

pytest.importorskip("triton")
from fastspec.kernels import tiles

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

# what `make test` compiles; the rest, near copies of these, only `make test-all`
SMOKE = re.compile(r"rank tile 32|narrow|diag|project|merge|chunks|rows by task|reduce|keep")


def cases():
    for capability, kind in itertools.product(report.CAPABILITIES, report.KINDS):
        for variant in report.variants(capability, kind):
            for dtype in report.KINDS[kind]:
                quick = kind == "fp32" or (dtype == torch.bfloat16 and SMOKE.search(variant.name))
                quick = quick and not re.search("tma, (task|dense)", variant.name)
                name = f"sm_{capability}-{kind}-{TYPE_NAMES[dtype]}-{variant.name}"
                marks = [] if quick else [pytest.mark.slow]
                yield pytest.param(capability, kind, dtype, variant, id=name, marks=marks)


def expected_instruction(capability: int, kind: str, rows: int) -> set[str]:
    """The newest matrix instruction that takes a tile of this many rows (docs/kernels.md says why)."""
    if kind == "fp32":
        return {"fma"}
    if capability == 100 and rows >= 64:
        return {"tcgen05"}
    if capability == 90 and rows >= 64:
        return {"wgmma"}
    return {"mma.sync"}


@pytest.mark.parametrize(("capability", "kind", "dtype", "variant"), cases())
def test_variant(capability, kind, dtype, variant):
    made = variant.compile(capability, dtype)
    assert made.spills == 0
    assert not made.undefined
    assert made.shared <= tiles.chip(capability).block_shared
    assert 0 < made.occupancy(tiles.chip(capability)) <= 1
    if not variant.loads_tiles:
        return
    main_loop = variant.name.startswith(("fwd", "bwd"))
    if main_loop or variant.name == "project":
        wanted = expected_instruction(capability, kind, variant.tile.block_m)
        assert made.instruction in wanted
    if "tma" in variant.name:
        assert made.bulk_loads >= 4  # A, B, V and C
    else:
        assert made.wide_loads >= 3  # A, B and V
    if kind == "tf32" and main_loop:
        assert made.narrow_copies == 0


@pytest.mark.parametrize("kind", report.KINDS)
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_unaligned_operands(kind, rank, direction):
    """Sizes and strides that are multiples of nothing: where Triton 3.6's assembler lost a descriptor."""
    fused = min(rank, tiles.FUSED_RANK[kind])
    tile = tiles.choose_tile(90, kind, report.MANY, fused, unaligned=True)
    dtype = report.KINDS[kind][-1]
    made = unaligned(direction, kind, fused, tile).compile(90, dtype)
    assert made.spills == 0
    assert not made.undefined


def unaligned(direction, kind, rank, tile):
    constants = {
        "stride_wi": 1,
        "stride_uk": 1,
        "stride_vi": 1,
        **tile.blocks(rank or tile.block_k),
    }
    constants |= {"CORE": "dense" if rank else "precomputed", "WIDE": False}
    constants["PRECISION"] = "tf32" if kind == "tf32" else "ieee"
    constants["TRANSPOSED"] = kind == "tf32" and direction == "bwd"
    own = (
        {"BIAS": True, "stride_xi": 1} if direction == "fwd" else {"GRAD": rank > 0, "stride_go": 1}
    )
    kernel = getattr(report.tile_program, f"spectral_linear_{direction}_kernel")
    return report.Variant("unaligned", kernel, constants | own, tile, aligned=False)


def test_a_lost_descriptor_is_seen():
    """Negative control, from ptxas 12.8: UR34 of the second product's descriptor was never written."""
    lost = """
        /*00c0*/ UMOV UR6, 0x400 ;
        /*5280*/ UIADD3 UR9, UR6, 0x4000, URZ ;
        /*52e0*/ UIADD3 UR34, UP0, UR34, 0x20, URZ ;
        /*74b0*/ UMOV UR32, UR6 ;
        /*74c0*/ UMOV UR33, 0x40000040 ;
        /*7560*/ UMOV UR35, 0x40000040 ;
        /*78b0*/ HGMMA.64x16x16.F32 R88, gdesc[UR32].tnspB, R88 ;
    """
    assert undefined_reads(lost) == ("UIADD3 UR34, UP0, UR34, 0x20, URZ",)
    assert undefined_reads("/*0000*/ UMOV UR34, URZ ;" + lost) == ()
    # where the first operand comes from registers, the lower half of the four is not read
    of_two = "/*0*/ UMOV UR34, URZ ; /*1*/ UMOV UR35, URZ ; /*2*/ HGMMA.64x16x16 R88, R112, gdesc[UR32] ;"
    assert undefined_reads(of_two.replace("/*", "/*000")) == ()


def test_spills_are_seen():
    """Negative control: a tile far too large for its warps spills, and the figures say so."""
    variant = next(report.variants(80, "16bit"))
    constants = {**variant.constants, "BLOCK_M": 128, "BLOCK_N": 256}
    made = compile_kernel(
        variant.kernel, constants, 80, torch.bfloat16, {"num_warps": 4, "num_stages": 2}
    )
    assert made.spills > 0


def test_scalar_loads_are_seen():
    """Negative control: without unit strides no load can be wide."""
    variant = next(report.variants(80, "16bit"))
    strided = {k: v for k, v in variant.constants.items() if not k.startswith("stride")}
    made = compile_kernel(
        variant.kernel, strided, 80, torch.bfloat16, {"num_warps": 8, "num_stages": 2}
    )
    assert made.wide_loads < 3


def test_import_needs_no_triton():
    """`fastspec.kernels` itself is lean: Triton is loaded by the modules that launch."""
    code = "import sys, fastspec.kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tile_table_is_whole():
    """A tile for every generation, arithmetic and row count, inside every limit."""
    for capability, kind in itertools.product((75, 80, 86, 89, 90, 100, 103, 120), report.KINDS):
        for rows, rank in itertools.product((1, 32, 33, 100_000), (0, 16, 32, 64)):
            tile = tiles.choose_tile(capability, kind, rows, rank)
            itemsize = 2 if kind == "16bit" else 4
            limit = tiles.chip(capability).block_shared
            assert tile.shared_bytes(itemsize, rank) <= limit
            assert tile.block_n + rank <= tiles.COLUMNS


@pytest.mark.parametrize("row_tiles", [1, 5, 40, 132, 1000])
@pytest.mark.parametrize("column_tiles", [1, 3, 24, 112])
@pytest.mark.parametrize("projection", [0, 0.25, 1])
@pytest.mark.parametrize("resident", [1, 2])
def test_no_split_is_shorter(row_tiles, column_tiles, projection, resident):
    slots = 132 * resident
    times = {
        each: math.ceil(row_tiles * math.ceil(column_tiles / each) / slots) * (each + projection)
        for each in range(1, column_tiles + 1)
    }
    each = tiles.split_columns(row_tiles, column_tiles, projection, slots)
    assert times[each] == min(times.values())
    assert tiles.tile_times(row_tiles, column_tiles, each, projection, slots) == times[each]


# rows, columns, tile-times of 128 x 128 beside a rank of 64 on 132 multiprocessors
@pytest.mark.parametrize(("columns", "length"), [(4096, 8.5), (14336, 28.5)])
def test_length_of_a_large_launch(columns, length):
    tile, each = tiles.fill(tiles.TABLE["hopper", "16bit", False], 4096, columns, 64, 132, True)
    assert tiles.tile_times(32, columns // tile.block_n, each, 64 / tile.block_n, 132) == length


def test_decoding_fills_the_chip():
    tile = tiles.choose_tile(90, "16bit", 8, 64)
    narrow, each = tiles.fill(tile, 8, 4096, 64, 132, True)
    assert (narrow.block_n, each) == (32, 1)  # 128 programs instead of 64
    assert tiles.fill(tile, 8, 4096, 64, 132, False) == (tile, 1)
    assert tiles.fill(tile, 8, 15 * 132 * 64, 64, 132, True)[0] == tile  # full with wide tiles


def test_launchers_trace_into_a_graph():
    """`make_fx` sees through the launchers to the kernels, with the table's warps and stages."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
    from torch.fx.experimental.proxy_tensor import make_fx

    from fastspec.kernels.spectral_linear import spectral_linear_bwd, spectral_linear_fwd

    def step(x, w, u, vh, delta, g):
        y, p = spectral_linear_fwd(x, w, None, u, vh, delta)
        return y, *spectral_linear_bwd(g, p, w, u, vh, delta)

    sizes = [(40, 64), (48, 64), (48, 16), (16, 64)]
    operands = [torch.empty(s, dtype=torch.bfloat16) for s in sizes]
    operands += [torch.empty(16), torch.empty(40, 48, dtype=torch.bfloat16)]
    graph = make_fx(step, tracing_mode="fake")(*operands).graph
    launches = [node for node in graph.nodes if "triton_kernel" in str(node.target)]
    assert len(launches) == 2
    tile = tiles.choose_tile(80, "16bit", 40, 16)
    for node in launches:
        (config,) = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).configs
        assert (config.num_warps, config.num_stages) == (tile.num_warps, tile.num_stages)
        assert node.kwargs["kwargs"]["BLOCK_M"] == tile.block_m
