"""compute-sanitizer's memcheck and racecheck over every kernel of the package, the Jacobi kernel included."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading

from gpu import record
from gpu.device import REHEARSING, pick
from gpu.record import Record
from gpu.small import KERNELS

PROGRAM = [sys.executable, "-m", "gpu.small", "tiny"]
TOOLS = pick(("memcheck", "racecheck", "synccheck"), ("memcheck",))
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (.*)")
CLEAN = re.compile(r"0 (errors|hazards)")
CACHE_OFF = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
}  # allocations side by side would hide an overrun


def command(tool: str) -> list[str]:
    """The checked program; filters are additive, so only the package's own kernels are watched."""
    filters = [part for name in KERNELS for part in ("--kernel-name", f"kernel_substring={name}")]
    # torch probes for driver functions that need not be there
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [
        "compute-sanitizer", "--tool", tool, *filters, *quiet, "--target-processes",
        "application-only", "--launch-timeout", "60", "--error-exitcode", "9", "--print-limit", "20",
        *PROGRAM,
    ]  # fmt: skip


def run(tool: str, rows: Record) -> None:
    argv = PROGRAM if REHEARSING else command(tool)
    name = f"{tool} of all kernels"
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=max(1, record.left() - 2),
            env={**os.environ, **CACHE_OFF},
        )
    except subprocess.TimeoutExpired as error:
        rows.fail(name, f"over time: {(error.stdout or b'')[-1000:]!r}")
        return
    output = done.stdout + done.stderr
    found = [m[2] for m in SUMMARY.finditer(output)]
    print(f"--- {tool}\n{output[-4000:]}", flush=True)
    if done.returncode == 0 and (REHEARSING or (found and CLEAN.match(found[-1]))):
        rows.add(name, result=found[-1] if found else "rehearsal")
    else:
        rows.fail(name, f"status {done.returncode}: {found or output[-1000:]}")


def main() -> int:
    rows = Record("sanitizer")
    if not REHEARSING and shutil.which("compute-sanitizer") is None:
        rows.fail("compute-sanitizer", "it is not on the PATH")
        return 1
    # compiles what the checked runs then find compiled
    plain = subprocess.run(PROGRAM, capture_output=True, text=True, timeout=max(1, record.left()))
    print(plain.stdout[-2000:], plain.stderr[-2000:])
    if plain.returncode:
        rows.fail("without a checker", plain.stderr)
        return 1
    threads = [threading.Thread(target=run, args=(tool, rows)) for tool in TOOLS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
