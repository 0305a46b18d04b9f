"""The eigensolver's lanes work together as on a GPU: no race, nothing read or written past an end."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"


def compiled(source: Path, into: Path, sanitizer: str) -> subprocess.CompletedProcess[str]:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-ffp-contract=off", f"-I{CSRC}"]
    checks = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = [*compiler, *flags, *checks, str(source), "-o", str(into)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_lanes(sanitizer: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    try:
        built = compiled(empty, tmp_path / "empty", sanitizer).returncode == 0
    except OSError:
        built = False
    if not built or subprocess.run([tmp_path / "empty"], capture_output=True).returncode:
        pytest.skip(f"no C++ compiler with -fsanitize={sanitizer}")
    made = compiled(HERE / "jacobi_lanes.cpp", tmp_path / "lanes", sanitizer)
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([tmp_path / "lanes"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
