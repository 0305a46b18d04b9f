"""Compiling kernels ahead of time, for chips that are not there, and reading what the compiler made.

Needs Triton's NVIDIA back end and the tools it carries, no GPU and no driver.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastspec.kernels import tiles

TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
FLOAT32_POINTERS = ("delta_ptr", "grad_ptr", "shares_ptr", "sum_ptr", "made_for_ptr")
INT32_POINTERS = ("arrived_ptr",)
INT64_POINTERS = ("task_ptr", "order_ptr", "bounds_ptr")
# what no shape makes a multiple of 16
COUNTS = ("N", "TASKS", "tiles_each", "steps", "slots", "cells", "forced")
SIZES = ("IN", "OUT", "K", "D")  # with the strides, what makes operands aligned

# The matrix instructions of the three generations, newest first; `fma` is the scalar units'.
INSTRUCTIONS = {
    "tcgen05": r"\btcgen05\.mma",
    "wgmma": r"\bwgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "fma": r"\bfma\.rn\.f32",
}
COPY = r"cp\.async\.c[ag]\.shared\.global\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one kernel became on one chip."""

    registers: int  # a thread
    spills: int  # bytes of local memory a thread: nothing but spills, Triton has no local arrays
    shared: int  # bytes a block
    warps: int
    instruction: str  # the newest of `INSTRUCTIONS` in the code, or "none"
    bulk_loads: int  # tiles fetched by TMA (cp.async.bulk.tensor)
    wide_loads: int  # 16-byte loads and asynchronous copies in the code
    narrow_copies: int  # asynchronous copies of less than 16 bytes
    undefined: tuple[
        str, ...
    ]  # instructions that read a uniform register which none before has written

    def occupancy(self, chip: tiles.Chip) -> float:
        """Share of a multiprocessor's warps that the blocks which fit on it bring (theoretical)."""
        by_warps = chip.sm_warps // self.warps
        # registers are handed out to warps in units of 256; every block pays 1 KB of shared memory
        warp_registers = -(-self.registers * 32 // 256) * 256
        by_registers = chip.sm_registers // warp_registers // self.warps
        by_shared = chip.sm_shared // (self.shared + 1024)
        return min(by_warps, by_registers, by_shared) * self.warps / chip.sm_warps


def compile_kernel(
    kernel: Any,
    constants: Mapping[str, Any],
    capability: int,
    dtype: torch.dtype,
    options: Mapping[str, int],
    descriptors: Mapping[str, tuple[int, int]] | None = None,
    aligned: bool = True,
) -> Compiled:
    """Compile for a capability such as 90, as a launch with row-major operands would.

    Args:
        kernel: a `triton.jit` function whose parameters follow this package's names.
        constants: values of its `constexpr` parameters, and of strides that are 1.
        options: `num_warps` and `num_stages`.
        descriptors: block shapes of its `_desc` parameters.
        aligned: whether sizes and strides are multiples of 16.

    Raises:
        triton.CompilationError, RuntimeError: the compiler refused it for this chip.
    """
    element = TYPE_NAMES[dtype]
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for place, name in enumerate(kernel.arg_names):
        divisible = name not in COUNTS
        if name in SIZES or name.startswith("stride"):
            divisible = aligned
        if name in constants:
            signature[name], divisible = "constexpr", False
        elif name.endswith("_desc"):
            assert descriptors is not None
            shape = ",".join(map(str, descriptors[name]))
            signature[name], divisible = f"tensordesc<{element}[{shape}]>", False
        elif name.endswith("_table") or name in INT64_POINTERS:
            signature[name] = "*i64"
        elif name in INT32_POINTERS:
            signature[name], divisible = "*i32", False
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FLOAT32_POINTERS else f"*{element}"
        else:
            signature[name] = "i32"
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, dict(constants), attributes)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=dict(options))
    return read(built.asm["ptx"], built.asm["cubin"], built.metadata)


def read(ptx: str, cubin: bytes, metadata: Any) -> Compiled:
    """The figures of a compiled kernel, from its PTX and its machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [str(tool), what, file.name], capture_output=True, text=True, check=True
            ).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    copies = [int(size, 0) for size in re.findall(COPY, ptx)]
    return Compiled(
        registers=numbers["REG"],
        spills=numbers["STACK"],
        shared=metadata.shared,
        warps=metadata.num_warps,
        instruction=next((n for n, p in INSTRUCTIONS.items() if re.search(p, ptx)), "none"),
        bulk_loads=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared\S*\.global\b", ptx)),
        wide_loads=sum(size == 16 for size in copies)
        + len(re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64|v4\.f32)", ptx)),
        narrow_copies=sum(size < 16 for size in copies),
        undefined=undefined_reads(code),
    )


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)\s*(.*?);")
# the matrix instruction's descriptors: of both operands, or where the first comes from registers of the
# second alone, in the upper half of the four
BOTH, SECOND = (0, 1, 2, 3), (2, 3)


def undefined_reads(code: str) -> tuple[str, ...]:
    """Instructions of sm_90 machine code that read a uniform register before any, in order, writes it.

    ptxas 12.8 makes such code of a few correct kernels with many spills (its 12.4, 12.9 and 13.0 do not):
    a descriptor of `wgmma` is then whatever ran before has left, and the product one of other operands.
    """
    if "HGMMA" not in code:
        return ()
    written: set[int] = set()
    found = []
    for operation, text in INSTRUCTION.findall(code):
        operands = [operand.strip() for operand in text.split(",")]
        uniform = operation.startswith(("U", "R2UR", "S2UR", "CS2UR", "VOTEU", "REDUX"))
        target = re.fullmatch(r"UR(\d+)", operands[0]) if uniform else None
        reads: set[int] = set()
        for place, operand in enumerate(operands[1 if target else 0 :]):
            for first in map(int, re.findall(r"\bUR(\d+)", operand)):
                if "gdesc" in operand:
                    parts: tuple[int, ...] = BOTH if place == 1 else SECOND
                else:
                    pair = "desc[" in operand or re.fullmatch(r"U\S+\.64", operation)
                    parts = (0, 1) if pair else (0,)
                reads |= {first + part for part in parts}
        if reads - written:
            found.append(f"{operation} {text.strip()}")
            written |= reads  # named once
        if target:
            wide = re.search(r"\.(64|WIDE|128)", operation)
            count = 1 if wide is None else 4 if wide[1] == "128" else 2
            written |= set(range(int(target[1]), int(target[1]) + count))
    return tuple(found)
