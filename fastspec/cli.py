"""The `fastspec` command. Each subcommand lives in a module that is imported only when it is named.

A subcommand's module offers `add_arguments(parser)` and `main(args) -> int` (the exit status).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "glue": ("fastspec.studies.commands.glue", "finetune and score a model on GLUE"),
    "demo": ("fastspec.studies.commands.demo", "finetune MiniLM in minutes: a table and a picture"),
    "analyze": (
        "fastspec.studies.commands.analyze",
        "study what finetuning does to singular vectors",
    ),
    "decoder": (
        "fastspec.studies.commands.decoder",
        "finetune a decoder by every method: held-out loss at searched rates",
    ),
    "factorize": (
        "fastspec.svd.cli",
        "write the leading singular triplets of a model to a file",
    ),
    "serve-bench": (
        "fastspec.studies.commands.serving",
        "measure many tasks in one batch on your own model",
    ),
    "memory": (
        "fastspec.model.quantized",
        "memory of an adapted model over float and quantised bases",
    ),
    "build": ("fastspec.build", "compile the C++ and CUDA parts ahead of their first use"),
    "backends": (
        "fastspec.availability",
        "say which implementations are there, and why any is not",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    import fastspec
    from fastspec import progress

    args = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fastspec",
        description="Adapt pretrained models by their spectral coefficients.",
    )
    parser.add_argument("--version", action="version", version=f"fastspec {fastspec.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((a for a in args if a in COMMANDS), None)
    module = None
    for name, (path, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
        if name == named:
            module = importlib.import_module(path)
            module.add_arguments(sub)
            output = sub.add_mutually_exclusive_group()
            output.add_argument("--quiet", action="store_true", help="results and errors alone")
            output.add_argument(
                "--verbose", action="store_true", help="also what the libraries underneath say"
            )
    parsed = parser.parse_args(args)
    assert module is not None
    try:
        with progress.shown("quiet" if parsed.quiet else "verbose" if parsed.verbose else "normal"):
            return module.main(parsed)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as e:
        if parsed.__dict__.get("debug"):
            raise
        print(f"fastspec {parsed.command}: error: {e}", file=sys.stderr)
        return 2
