"""The `fastspec build` command: the compiled parts ahead of their first use, for this torch and machine."""

from __future__ import annotations

import argparse

from fastspec import _build, _extension


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part",
        choices=_build.PARTS,
        action="append",
        help="which part: _C (C++, for the CPU) or _C_cuda (its CUDA kernels, needs nvcc); default both",
    )


def main(args: argparse.Namespace) -> int:
    failures = 0
    for part in args.part or _build.PARTS:
        reason = _extension.rebuild(part)
        if reason is None:
            print(f"{part}: built in {_extension.build_folder(part)}")
        else:
            print(f"{part}: not built: {reason}")
            failures += part == "_C"  # the CUDA part is for machines that have nvcc
    return 1 if failures else 0
