"""Builds the compiled part where it can; everything else about the package stands in pyproject.toml.

The library works without it. `FASTSPEC_NO_EXT=1` skips the build; a missing torch (in an isolated build) or
a failing compiler skips it too, and the reason is left in `fastspec/_build.txt` for `fastspec.backends()`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
NOTE = ROOT / "fastspec" / "_build.txt"
SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))


def note(reason: str) -> None:
    NOTE.write_text(reason + "\n")
    print(f"fastspec: no compiled part: {reason}", file=sys.stderr)


def extension() -> dict:
    """The `setup` arguments of the extension, or none and a note that says why."""
    NOTE.unlink(missing_ok=True)
    if os.environ.get("FASTSPEC_NO_EXT") == "1":
        note("skipped at installation by FASTSPEC_NO_EXT=1")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as e:
        note(
            f"torch was not there at installation ({e}): pip install --no-build-isolation fastspec"
        )
        return {}

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as e:  # no compiler, no headers, an error in it: Python is left
                note(f"the build failed: {' '.join(str(e).split())[:500]}")
                self.extensions = []
                if not self.inplace:  # the package's files were copied before this ran
                    self.copy_file(str(NOTE), os.path.join(self.build_lib, "fastspec"))

    # -fopenmp is for the compiler alone: linked, it would bring a second OpenMP runtime beside torch's
    module = CppExtension("fastspec._C", SOURCES, extra_compile_args=["-O3", "-g0", "-fopenmp"])
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": OptionalBuild.with_options(no_python_abi_suffix=True)},
    }


setup(**extension())
