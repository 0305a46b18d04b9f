"""Runs the interpreter's suites in processes of their own: TRITON_INTERPRET=1 must precede Triton's import.

By hand: TRITON_INTERPRET=1 pytest tests/test_kernels
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize("suite", sorted(p.name for p in HERE.glob("test_interpreted_*.py")))
def test_suite(suite: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", str(HERE / suite)]
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    print(run.stdout[-6000:], run.stderr[-2000:])
    assert run.returncode == 0, f"{suite}: see the output above"
