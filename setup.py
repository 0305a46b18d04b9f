"""Builds the compiled parts where it can; everything else about the package stands in pyproject.toml.

`fastspec._C` (csrc/*.cpp) needs a C++ compiler; `fastspec._C_cuda` (csrc/*.cu) needs nvcc and a torch with
CUDA too, but no GPU: without one it is built for the architectures of that torch, or for those named in
TORCH_CUDA_ARCH_LIST. The library works without either. `FASTSPEC_NO_EXT=1` skips both; a missing torch (in
an isolated build) or a failing compiler skips them too, and the reason is left in `fastspec/_build.txt` for
`fastspec.backends()`.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
NOTES = ROOT / "fastspec" / "_build.txt"
PARTS = ("_C", "_C_cuda")


def note(part: str, reason: str) -> None:
    """Keep for `fastspec.backends()` why `part` is not there: one line each."""
    with NOTES.open("a") as notes:
        notes.write(f"{part}: {' '.join(reason.split())}\n")
    print(f"fastspec: no {part}: {reason}", file=sys.stderr)


def sources(suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob(f"*{suffix}"))


def architectures(built_for: list[str]) -> str:
    """TORCH_CUDA_ARCH_LIST of a torch built for such as sm_90a; PTX of the newest serves later GPUs.

    Without the letter, which stands for instructions of one architecture alone that nothing here uses.
    """
    numbers = {m[1] for arch in built_for if (m := re.fullmatch(r"sm_(\d+)[a-z]?", arch))}
    return ";".join(f"{n[:-1]}.{n[-1]}" for n in sorted(numbers, key=int)) + "+PTX"


def cuda_part() -> list[Extension]:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if torch.version.cuda is None:
        note("_C_cuda", f"torch {torch.__version__} was built without CUDA")
        return []
    if CUDA_HOME is None:
        note("_C_cuda", "nvcc was not found at installation; set CUDA_HOME")
        return []
    if not torch.cuda.is_available():
        names = architectures(torch._C._cuda_getArchFlags().split())
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", names)
    flags = {"cxx": ["-O3", "-g0"], "nvcc": ["-O3"]}
    return [CUDAExtension("fastspec._C_cuda", sources(".cu"), extra_compile_args=flags)]


def extensions() -> dict:
    """The `setup` arguments of the compiled parts, or none and notes that say why."""
    NOTES.unlink(missing_ok=True)
    if os.environ.get("FASTSPEC_NO_EXT") == "1":
        for part in PARTS:
            note(part, "skipped at installation by FASTSPEC_NO_EXT=1")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as e:
        advice = "install torch first, then this folder by pip install --no-build-isolation"
        for part in PARTS:
            note(part, f"torch was not there at installation ({e}): {advice}")
        return {}

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            wanted, built, compiler = self.extensions, [], self.compiler
            for extension in wanted:  # each by itself: a failing nvcc must not cost the CPU part
                self.extensions, self.compiler = [extension], compiler
                try:
                    super().run()
                    built.append(extension)
                except Exception as e:  # no compiler, no headers, an error in it: Python is left
                    note(extension.name.split(".")[-1], f"the build failed: {str(e)[:500]}")
            self.extensions = built
            if NOTES.exists() and not self.inplace:  # the package's files were copied before this
                self.copy_file(str(NOTES), os.path.join(self.build_lib, "fastspec"))

    # -fopenmp is for the compiler alone: linked, it would bring a second OpenMP runtime beside torch's
    flags = ["-O3", "-g0", "-fopenmp"]
    cpu = CppExtension("fastspec._C", sources(".cpp"), extra_compile_args=flags)
    return {
        "ext_modules": [cpu, *cuda_part()],
        "cmdclass": {"build_ext": OptionalBuild.with_options(no_python_abi_suffix=True)},
    }


if __name__ == "__main__":
    setup(**extensions())
