"""What the hardware counters say of four kernels (ncu), and where the time of one step goes (a trace)."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from typing import Any

from torch.profiler import ProfilerActivity
from torch.profiler import profile as trace

from gpu import device, networks, record
from gpu.device import REHEARSING
from gpu.networks import BASE, CANDIDATES, FLOOR, OURS
from gpu.record import Record

PROGRAM = [sys.executable, "-m", "gpu.small", "large"]
KERNELS = "regex:spectral_linear|project_kernel|merge_kernel"
# of the set "detailed", what decides; others stay in the log
KEPT = (
    "Duration", "SM Frequency", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput",
    "L2 Cache Throughput", "L1/TEX Hit Rate", "L2 Hit Rate", "Registers Per Thread",
    "Theoretical Occupancy", "Achieved Occupancy", "Executed Ipc Active", "Issue Slots Busy",
    "No Eligible", "Waves Per SM", "Dynamic Shared Memory Per Block", "Grid Size",
)  # fmt: skip
LINES = 25


def counters(rows: Record) -> None:
    command = [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--set", "detailed",
        "--kernel-name", KERNELS, "--launch-count", "8", "--csv", "--page", "details", *PROGRAM,
    ]  # fmt: skip
    if REHEARSING:
        command = PROGRAM
    elif shutil.which("ncu") is None:
        raise RuntimeError("ncu is not on the PATH")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=max(1, record.left() * 0.6),
    )
    if done.returncode:
        raise RuntimeError(
            f"ncu ended with {done.returncode}: {(done.stdout + done.stderr)[-1000:]}"
        )
    kernels = parse(done.stdout)
    if not REHEARSING:
        print(done.stdout[-20000:])
        if not kernels:
            raise RuntimeError("ncu saw no kernel")
    for name, figures in kernels.items():
        rows.add(f"ncu {name}", **figures)


def parse(text: str) -> dict[str, dict[str, str]]:
    """Kernel and launch -> metric (with its unit) -> value, of ncu's CSV behind whatever else was printed."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        metric = row.get("Metric Name")
        if metric in KEPT:
            kernel = f"{row['ID']} {row['Kernel Name'].split('(')[0]}"
            found.setdefault(kernel, {})[f"{metric}, {row['Metric Unit']}".rstrip(", ")] = row[
                "Metric Value"
            ]
    return found


def step_trace(rows: Record) -> None:
    """Kernels of one eager step of BERT-base by their share of the device's time."""
    base = networks.base_of(BASE)
    for name, prepare in {FLOOR: networks.floor, OURS: CANDIDATES[OURS]}.items():
        step = networks.make(prepare, base, BASE)
        for _ in range(3):
            step()
        device.synchronise()
        activities = [ProfilerActivity.CPU] if REHEARSING else [ProfilerActivity.CUDA]
        with trace(activities=activities) as seen:
            step()
            device.synchronise()
        kernels: dict[str, list[float]] = {}
        for event in seen.key_averages():
            taken = event.self_cpu_time_total if REHEARSING else event.self_device_time_total
            if taken:
                kernels[event.key[:90]] = [event.count, taken]
        order = sorted(kernels.items(), key=lambda item: -item[1][1])[:LINES]
        total = sum(taken for _, taken in kernels.values())
        rest: dict[str, Any] = {key: {"count": n, "us": us} for key, (n, us) in order}
        rows.add(f"trace of a step of {BASE}, {name}", total_us=total, kernels=len(kernels), **rest)


def main() -> int:
    rows = Record("profile")
    with rows.row("ncu"):
        counters(rows)
    with rows.row("trace"):
        step_trace(rows)
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
