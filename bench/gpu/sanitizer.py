"""compute-sanitizer over every kernel of the package: the Triton kernels, and apart the eigensolver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from gpu import record
from gpu.device import REHEARSING, pick
from gpu.record import Record
from gpu.small import KERNELS

PARTS = (
    "kernels",
    "jacobi",
)  # each under every tool, so that one over time loses its own rows alone
TOOLS = pick(("memcheck", "racecheck", "synccheck"), ("memcheck",))
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (.*)")
CLEAN = re.compile(r"0 (errors|hazards)")
KEPT = 3000  # characters of what a tool found
CACHE_OFF = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
}  # allocations side by side would hide an overrun


def program(part: str) -> list[str]:
    return [sys.executable, "-m", "gpu.small", part]


def command(tool: str, part: str) -> list[str]:
    """The checked program; filters are additive, so only the package's own kernels are watched."""
    filters = [text for name in KERNELS for text in ("--kernel-name", f"kernel_substring={name}")]
    # torch probes for driver functions that need not be there
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [
        "compute-sanitizer", "--tool", tool, *filters, *quiet, "--target-processes",
        "application-only", "--launch-timeout", "60", "--error-exitcode", "9", "--print-limit", "20",
        *program(part),
    ]  # fmt: skip


def findings(output: str) -> str:
    """The first of what a tool reported: its own lines, without those of the program."""
    lines = [
        line.removeprefix("=========").strip() for line in output.splitlines() if "=====" in line
    ]
    return "\n".join(lines)[:KEPT]


def run(tool: str, part: str, rows: Record) -> None:
    name = f"{tool} of {part}"
    try:
        done = subprocess.run(
            program(part) if REHEARSING else command(tool, part),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=max(1, record.left() - 2),
            env={**os.environ, **CACHE_OFF},
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        rows.fail(name, f"over time, after {output[-300:]!r}", findings=findings(output))
        return
    output = done.stdout.decode(errors="replace")
    print(f"--- {name}\n{output[-4000:]}", flush=True)
    found = [m[2] for m in SUMMARY.finditer(output)]
    if done.returncode == 0 and (REHEARSING or (found and CLEAN.match(found[-1]))):
        rows.add(name, result=found[-1] if found else "rehearsal")
    else:
        error = f"status {done.returncode}: {found or output[-1000:]}"
        rows.fail(name, error, findings=findings(output))


def check(part: str, rows: Record) -> None:
    """One part under every tool at once, when a run without any has compiled what they find compiled."""
    plain = subprocess.run(
        program(part), capture_output=True, text=True, timeout=max(1, record.left())
    )
    print(plain.stdout[-2000:], plain.stderr[-2000:])
    if plain.returncode or "no jacobi_eigh" in plain.stdout:
        rows.fail(f"{part} without a checker", plain.stdout[-300:] + plain.stderr)
        return
    together(run, [(tool, part, rows) for tool in TOOLS])


def together(function: Callable[..., None], calls: Sequence[tuple]) -> None:
    threads = [threading.Thread(target=function, args=arguments) for arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    rows = Record("sanitizer")
    if not REHEARSING and shutil.which("compute-sanitizer") is None:
        rows.fail("compute-sanitizer", "it is not on the PATH")
        return 1
    together(check, [(part, rows) for part in PARTS])
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
