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
COUNTS = ("N", "TASKS", "tiles_each", "steps")  # what no shape makes a multiple of 16

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
) -> Compiled:
    """Compile for a capability such as 90, as a launch with aligned, row-major operands would.

    Args:
        kernel: a `triton.jit` function whose parameters follow this package's names.
        constants: values of its `constexpr` parameters, and of strides that are 1.
        options: `num_warps` and `num_stages`.
        descriptors: block shapes of its `_desc` parameters.

    Raises:
        triton.CompilationError, RuntimeError: the compiler refused it for this chip.
    """
    element = TYPE_NAMES[dtype]
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list] = {}
    for place, name in enumerate(kernel.arg_names):
        divisible = name not in COUNTS
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
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, dict(constants), aligned)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=dict(options))
    return read(built.asm["ptx"], built.asm["cubin"], built.metadata)


def read(ptx: str, cubin: bytes, metadata: Any) -> Compiled:
    """The figures of a compiled kernel, from its PTX and its machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
    )
