"""What the machine is, and its two ceilings: copies of memory, and a product of bf16 matrices."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import statistics
import subprocess
import sys

import torch
from kernel_problems import tf32

import fastspec
from gpu import device
from gpu.device import DEVICE, pick
from gpu.record import Record

COPY = pick(2**31, 2**20)  # bytes
ORDER = pick(8192, 64)
LIBRARIES = ("triton", "transformers", "peft", "cupy-cuda13x", "jax", "numpy", "eigentune")
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "cuobjdump", "g++", "ninja")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.draw,temperature.gpu,mig.mode.current"


def median(step: device.Step, rounds: int = 15) -> float:
    for _ in range(3):
        step()
    return statistics.median(device.on_device(step) for _ in range(rounds))


def installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "there" if importlib.util.find_spec(name) else "none"


def smi() -> str:
    """What nvidia-smi says; it is only asked."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (run.stdout or run.stderr).strip()


def main() -> int:
    record = Record("versions")
    if not device.REHEARSING and not torch.cuda.is_available():
        record.fail("GPU", "torch sees no usable GPU")
        return 1
    record.about(
        smi=smi(),
        cuda_of_torch=torch.version.cuda,
        libraries={name: installed(name) for name in LIBRARIES},
        tools=[name for name in TOOLS if shutil.which(name)],
        rehearsal=device.REHEARSING,
    )
    if not device.REHEARSING:
        about = torch.cuda.get_device_properties(0)
        record.about(
            multiprocessors=about.multi_processor_count,
            memory_gb=about.total_memory / 1e9,
            l2_mb=about.L2_cache_size / 1e6,
            capability=f"{about.major}.{about.minor}",
        )
    print(smi())
    print(fastspec.backends())
    source = torch.randint(0, 255, (COPY,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = median(lambda: target.copy_(source))
    record.add("copy", gb_per_s=2 * COPY / seconds / 1e9, ms=1e3 * seconds)
    for name, dtype, allowed in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True)):
        a, b = (torch.randn(ORDER, ORDER, device=DEVICE, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        with tf32(allowed):
            seconds = median(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
        record.add(f"{name} product", tflops=2 * ORDER**3 / seconds / 1e12, ms=1e3 * seconds)
    return record.status()


if __name__ == "__main__":
    sys.exit(main())
