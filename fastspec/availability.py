"""What is installed, what runs, and why anything does not."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys

import torch

from fastspec import _extension


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: whether it can serve here, and the reason or version."""

    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{'yes' if self.available else 'no ':3}  {self.detail}"


class Backends(dict[str, Backend]):
    """Name to `Backend`; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(f"{name:14} {backend}" for name, backend in self.items())

    __repr__ = __str__


def backends() -> Backends:
    """Which implementations of fastspec are there, and why any is not.

    Keys: "aten" (always), "extension" (the compiled csrc/), "extension_cuda" (its CUDA kernels),
    "triton", "cuda", and the optional libraries "transformers", "datasets", "accelerate" and "peft".
    """
    out = Backends(aten=Backend(True, f"torch {torch.__version__}"))
    _extension.load("cuda")
    out["extension"] = _compiled(_extension.unavailable_reason(), "compiled csrc/ loaded")
    out["extension_cuda"] = _compiled(_extension.cuda_unavailable_reason(), "CUDA kernels loaded")
    out["triton"] = _module("triton", "needed for GPU kernels: pip install triton")
    out["cuda"] = _cuda()
    for name, extra in [
        ("transformers", "glue"),
        ("datasets", "glue"),
        ("accelerate", "glue"),
        ("peft", "peft"),
    ]:
        out[name] = _module(name, f"optional: pip install 'fastspec[{extra}]'")
    return out


def _module(name: str, advice: str) -> Backend:
    if importlib.util.find_spec(name) is None:
        return Backend(False, f"not installed; {advice}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return Backend(True, f"{name} {version(name)}")
    except PackageNotFoundError:
        return Backend(True, f"{name}, version unknown")


def _compiled(reason: str | None, loaded: str) -> Backend:
    return Backend(reason is None, reason or loaded)


def _cuda() -> Backend:
    if torch.version.cuda is None:
        return Backend(False, f"torch {torch.__version__} was built without CUDA")
    if not torch.cuda.is_available():
        return Backend(False, f"CUDA {torch.version.cuda} in torch, but no usable GPU is seen")
    return Backend(True, f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The `fastspec backends` command takes no arguments."""


def main(args: argparse.Namespace) -> int:
    print(backends(), file=sys.stdout)
    return 0
