"""Interpreter tests need TRITON_INTERPRET=1 before Triton is first imported, compiler tests must not have
it. So each kind is collected only in its own environment; `test_interpreter.py` starts the other one.
"""

import os

import pytest

collect_ignore_glob = (
    ["test_compile.py", "test_interpreter.py", "test_launch.py", "test_tracing.py"]
    if os.environ.get("TRITON_INTERPRET") == "1"
    else ["test_interpreted_*.py"]
)


@pytest.fixture(autouse=True)
def exact_tf32(request, monkeypatch):
    """Without rounding tests of TF32 keep float32's tolerance: the interpreter has full precision."""
    if os.environ.get("TRITON_INTERPRET") == "1" and "matrix_units" not in request.fixturenames:
        from kernel_sanitizer import without_rounding

        without_rounding(monkeypatch)


@pytest.fixture(autouse=True)
def _tma_for_few_rows():
    """Small problems take every route."""
    from fastspec.kernels import dispatch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "TMA_ROWS", 1)
        yield
