"""Interpreter tests need TRITON_INTERPRET=1 before Triton is first imported, compiler tests must not have
it. So each kind is collected only in its own environment; `test_interpreter.py` starts the other one.
"""

import os

collect_ignore_glob = (
    ["test_compile.py", "test_interpreter.py", "test_launch.py", "test_tracing.py"]
    if os.environ.get("TRITON_INTERPRET") == "1"
    else ["test_interpreted_*.py"]
)
