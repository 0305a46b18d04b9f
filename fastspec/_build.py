"""The compiled parts and how they are built: at installation (setup.py), or once at first use (`_extension`).

`fastspec._C` (csrc/*.cpp) needs a C++ compiler; `fastspec._C_cuda` (csrc/*.cu) needs nvcc and a torch with
CUDA too, but no GPU: without one it is built for the architectures of that torch, or for those named in
TORCH_CUDA_ARCH_LIST. Neither depends on the version of Python.

Nothing of fastspec is imported here, and torch only where it is needed: setup.py loads this file by its path,
in an isolated build without torch too.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("_C", "_C_cuda")
SUFFIXES = {"_C": ".cpp", "_C_cuda": ".cu"}
# -fopenmp is for the compiler alone: linked, it would bring a second OpenMP runtime beside torch's
CXX_FLAGS = ["-O3", "-g0", "-fopenmp"]
NVCC_FLAGS = {"cxx": ["-O3", "-g0"], "nvcc": ["-O3"]}

_HERE = Path(__file__).resolve().parent


class CannotBuildError(RuntimeError):
    """A part can't be built here; the message says what is missing."""


def sources_folder() -> Path:
    """The folder csrc: inside an installed package, beside the package in a checkout.

    Raises:
        CannotBuildError: neither is there.
    """
    for folder in (_HERE / "csrc", _HERE.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise CannotBuildError("its sources (csrc) are not there: install again from a full checkout")


def architectures(built_for: list[str]) -> str:
    """TORCH_CUDA_ARCH_LIST of a torch built for such as sm_90a; PTX of the newest serves later GPUs.

    Without the letter, which stands for instructions of one architecture alone that nothing here uses.
    """
    numbers = {m[1] for arch in built_for if (m := re.fullmatch(r"sm_(\d+)[a-z]?", arch))}
    return ";".join(f"{n[:-1]}.{n[-1]}" for n in sorted(numbers, key=int)) + "+PTX"


def extension(part: str, sources: list[str]) -> Any:
    """The setuptools extension of one part.

    Raises:
        CannotBuildError: torch has no CUDA, or nvcc is not there.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    name = f"fastspec.{part}"
    if part == "_C":
        return CppExtension(name, sources, extra_compile_args=CXX_FLAGS)
    if torch.version.cuda is None:
        raise CannotBuildError(f"torch {torch.__version__} was built without CUDA")
    if CUDA_HOME is None:
        raise CannotBuildError("nvcc was not found: set CUDA_HOME")
    if not torch.cuda.is_available():
        names = architectures((torch._C._cuda_getArchFlags() or "").split())
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", names)
    return CUDAExtension(name, sources, extra_compile_args=NVCC_FLAGS)


def build_command(failed: Callable[[str, str], None], finished: Callable[[Any], None]) -> type:
    """The `build_ext` that builds each part by itself: a failing nvcc must not cost the CPU part.

    Args:
        failed: told the part and why it could not be built.
        finished: told the command when all is done.
    """
    from torch.utils.cpp_extension import BuildExtension

    class EachByItself(BuildExtension):  # type: ignore[misc]
        extensions: list[Any]
        compiler: Any
        inplace: Any

        def run(self) -> None:
            wanted, built, compiler, inplace = self.extensions, [], self.compiler, self.inplace
            for one in wanted:
                self.extensions, self.compiler = [one], compiler
                try:
                    super().run()
                    built.append(one)
                except Exception as e:  # no compiler, no headers, an error in it: Python is left
                    failed(one.name.split(".")[-1], f"the build failed: {str(e)[:500]}")
                    self.inplace = inplace  # which setuptools switches off while it builds
            self.extensions = built
            finished(self)

    return EachByItself.with_options(no_python_abi_suffix=True)


def key(part: str) -> str:
    """What a build depends on, as 16 hexadecimal digits: sources, flags, torch, compiler, processor."""
    import torch

    digest = hashlib.sha256()
    for file in sorted(sources_folder().glob("*")):
        if file.suffix in (".cpp", ".cu", ".h"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    about = (part, CXX_FLAGS, NVCC_FLAGS, torch.__version__, torch.version.cuda)
    compilers = [os.environ.get(name) for name in ("CC", "CXX", "TORCH_CUDA_ARCH_LIST")]
    digest.update(repr((about, compilers, platform.machine(), sys.platform)).encode())
    return digest.hexdigest()[:16]


def build_into(part: str, folder: Path) -> Path:
    """Build one part in a process of its own; the library in `folder`, where all of it is there or none.

    Raises:
        CannotBuildError: why not, with the end of the compiler's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{part}.log"
    command = [sys.executable, __file__, part, str(folder)]
    with log.open("wb") as output:
        code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    library = folder / f"{part}.so"
    if code != 0 or not library.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = next((x for x in lines if x.startswith(SAYS)), "") or " ".join(lines[-3:])[-500:]
        raise CannotBuildError(f"{said.removeprefix(SAYS)} (the whole output: {log})")
    return library


SAYS = "fastspec can't build: "


def _main(part: str, folder: str) -> None:
    """The process of `build_into`."""
    import tempfile

    from setuptools import setup

    why: list[str] = []
    place = Path(folder).resolve()
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        try:
            sources = [str(file) for file in sorted(sources_folder().glob(f"*{SUFFIXES[part]}"))]
            setup(
                name="fastspec-parts",
                script_args=["-q", "build_ext", "--build-lib", scratch, "--build-temp", scratch],
                ext_modules=[extension(part, sources)],
                cmdclass={"build_ext": build_command(lambda _, e: why.append(e), lambda _: None)},
            )
            (built,) = Path(scratch).rglob(f"{part}*.so")
            os.replace(built, place / f"{part}.so")
        except (CannotBuildError, ImportError, ValueError) as e:
            sys.exit(SAYS + " ".join((why[0] if why else str(e)).split()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
