"""The compiled parts, where they are missing or made for another torch: carried ones, else built here."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpu import record
from gpu.device import REHEARSING
from gpu.record import Record

PACKED = Path("build/gpu/ext")
PACKAGE = Path("fastspec")
PARTS = ("_C.so", "_C_cuda.so")
STAMP = "sources.sha256"
QUESTION = "from fastspec import _extension as e; print(e.load('_C_cuda', build=False) or '')"


def reason() -> str:
    """Why the compiled parts do not serve; empty where they do. Asked of a process of its own."""
    done = subprocess.run([sys.executable, "-c", QUESTION], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else done.stderr[-500:]


def fingerprint() -> str:
    """Of the sources of the compiled parts: what was packed of others does not serve."""
    digest = hashlib.sha256()
    for path in sorted(Path("csrc").iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def carried() -> bool:
    """Copy what was packed of these sources; whether it loads."""
    stamp = PACKED / STAMP
    if not stamp.exists() or stamp.read_text() != fingerprint():
        return False
    for part in PARTS:
        shutil.copy2(PACKED / part, PACKAGE / part)
    return not reason()


def built() -> str:
    """Build in place; what the build said at last."""
    environment = {"TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": str(os.cpu_count()), **os.environ}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=max(1, record.left()),
    )
    return (done.stdout + done.stderr)[-1500:]


def main() -> int:
    rows = Record("build")
    started = time.perf_counter()
    before = reason()
    if not before:
        rows.add("compiled parts", how="there")
        return 0
    print(before)
    if REHEARSING and any((PACKAGE / part).exists() for part in PARTS):
        rows.add("compiled parts", how="left as they are in a rehearsal")
        return 0
    if carried():
        rows.add("compiled parts", how="carried", seconds=time.perf_counter() - started)
        return 0
    if REHEARSING:
        rows.add("compiled parts", how="not built in a rehearsal")
        return 0
    said = built()
    if now := reason():
        rows.fail("compiled parts", f"{now}\n{said}")
    else:
        rows.add("compiled parts", how="built", seconds=time.perf_counter() - started)
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
