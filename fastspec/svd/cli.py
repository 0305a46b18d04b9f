"""`fastspec factorize`: the leading singular triplets of a checkpoint's weights, as a basis file.

Reads safetensors shards a few matrices at a time, never the whole model. Every finished matrix is a
small file in `OUTPUT.parts/`, so a run that was stopped goes on where it was; under `torchrun` the
matrices are divided among the ranks and the first one joins the parts at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastspec import progress
from fastspec.config import resolve_rank
from fastspec.files import weight_files
from fastspec.fingerprint import tensor_fingerprint
from fastspec.svd.basis_file import BasisError
from fastspec.svd.parts import join_parts, read_part, write_part
from fastspec.svd.topk import topk_svd

# tables and heads: `spectralize` leaves them alone
EXCLUDE = r"(^|\.)(\w*embed\w*|wte|wpe|shared|lm_head|classifier|score|qa_outputs)(\.|$)"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument(
        "model",
        metavar="MODEL_OR_DIR",
        help="a safetensors file, a folder with safetensors shards, or a model name on the hub",
    )
    parser.add_argument(
        "--rank",
        required=True,
        type=_rank,
        help="triplets per matrix: a count (smaller matrices give all they have), a fraction of "
        "min(in, out) below 1, or 'full'",
    )
    parser.add_argument("-o", "--output", required=True, type=Path, help="the basis file to write")
    parser.add_argument("--include", default="", help="regex: only weights whose name it finds")
    parser.add_argument(
        "--exclude",
        default=EXCLUDE,
        help="regex: not the weights whose name it finds (%(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the stored vectors; default: the weight's"
    )
    parser.add_argument("--tol", type=float, default=1e-5, help="relative residual (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--memory", type=float, default=1.0, help="GiB for weights and scratch (%(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    source = Checkpoint(args.model)
    names = source.matrices(args.include, args.exclude)
    if not names:
        raise ValueError(
            f"no weight matrix of {args.model} matches --include {args.include!r} and is spared by "
            f"--exclude {args.exclude!r}"
        )
    parts = args.output.with_name(args.output.name + ".parts")
    with _ranks() as (rank, world, barrier):
        parts.mkdir(parents=True, exist_ok=True)
        # equal shapes stay together, and each rank gets every world-th of them
        mine = sorted(names, key=lambda n: (source.shape(n), n))[rank::world]
        _factorize(source, mine, parts, args, show=rank == 0)
        barrier()
        if rank == 0:
            wanted = [_asked(source, name, args) for name in names]
            join_parts(args.output, parts, wanted, {"model": args.model, "tol": args.tol})
            shutil.rmtree(parts)
        barrier()
    if rank == 0:
        print(f"{len(names)} matrices: {args.output}")
    return 0


class Checkpoint:
    """The named tensors of one or many safetensors files, read one at a time."""

    def __init__(self, model: str) -> None:
        path = Path(model)
        if not path.exists():
            path = _from_hub(model)
        files = [path] if path.is_file() else weight_files(path)
        if not files:
            raise ValueError(
                f"{path} holds no .safetensors file; save the model in that format first"
            )
        self._file: dict[str, Path] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as f:
                    for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
                        self._file[name] = file
                        self._shape[name] = tuple(f.get_slice(name).get_shape())
            except SafetensorError as e:
                raise ValueError(f"{file} is not a readable safetensors file: {e}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def matrices(self, include: str, exclude: str) -> list[str]:
        """Names of the two-dimensional `*.weight` tensors that the patterns leave."""
        return [
            name
            for name, shape in self._shape.items()
            if len(shape) == 2
            and name.endswith(".weight")
            and re.search(include, name)
            and not (exclude and re.search(exclude, name))
        ]

    def read(self, name: str) -> Tensor:
        with safe_open(self._file[name], framework="pt") as f:
            return f.get_tensor(name)


def _asked(source: Checkpoint, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a part of this run has to say of itself, as far as it is known without the weight's values."""
    shape = source.shape(name)
    asked = {
        "weight": name,
        "shape": list(shape),
        "rank": min(resolve_rank(args.rank, min(shape)), *shape),
        "tol": args.tol,
        "seed": args.seed,
    }
    return asked | ({"dtype": args.dtype} if args.dtype else {})


def _factorize(
    source: Checkpoint, names: list[str], parts: Path, args: argparse.Namespace, show: bool
) -> None:
    """Write the missing parts, a stack of equal shapes at a time."""
    with _bar(len(names), show) as advance:
        pending: list[tuple[Tensor, dict[str, Any]]] = []
        for name in names:
            weight = source.read(name)
            asked = _asked(source, name, args) | {
                "fingerprint": tensor_fingerprint(weight),
                "dtype": args.dtype or str(weight.dtype).removeprefix("torch."),
            }
            if _is_done(parts, asked):
                advance(1)
                continue
            if pending and (
                pending[0][0].shape != weight.shape
                or 4 * (len(pending) + 1) * weight.nbytes > args.memory * 2**30
            ):
                _write_parts(pending, parts, args)
                advance(len(pending))
                pending = []
            pending.append((weight, asked))
        if pending:
            _write_parts(pending, parts, args)
            advance(len(pending))


def _write_parts(
    stack: list[tuple[Tensor, dict[str, Any]]], parts: Path, args: argparse.Namespace
) -> None:
    found = topk_svd(
        [weight for weight, _ in stack],
        [asked["rank"] for _, asked in stack],
        tol=args.tol,
        seed=args.seed,
        names=[asked["weight"] for _, asked in stack],
        dtype=DTYPES.get(args.dtype),
        workspace=max(1, int(args.memory * 2**29)),
        progress=False,
    )
    assert isinstance(found, list)
    for (_, asked), svd in zip(stack, found, strict=True):
        write_part(parts, asked, svd)


def _is_done(parts: Path, asked: dict[str, Any]) -> bool:
    """Whether a part of an earlier run is whole and holds what is asked for now."""
    try:
        read_part(parts, asked)
    except FileNotFoundError:
        return False
    except BasisError as e:
        print(f"fastspec: {e}; it is made anew", file=sys.stderr)
        return False
    return True


def _from_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{model} is no file or folder here, and models are fetched by name with huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors"]))
    except Exception as e:  # its own, httpx's and validation errors have no common base
        raise ValueError(f"{model} is no file or folder here and not to be had by name: {e}") from e


@contextlib.contextmanager
def _ranks() -> Iterator[tuple[int, int, Any]]:
    """(rank, world size, barrier) of a `torchrun`, or of one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1, lambda: None
        return
    import torch.distributed as dist

    # the first to be done waits for the last, which may have the larger matrices by hours
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        yield dist.get_rank(), dist.get_world_size(), dist.barrier
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Any]:
    if not show:
        yield lambda count: None
        return
    try:
        shown = progress.bar(total, "factorize", "matrix", delay=1)
    except ImportError:
        yield lambda count: None
        return
    with shown:
        yield shown.update


def _rank(text: str) -> int | float | str:
    if text == "full":
        return text
    value: int | float = float(text) if "." in text else int(text)
    if value <= 0 or (isinstance(value, float) and value > 1):
        raise argparse.ArgumentTypeError(f"{text} is no count, fraction in (0, 1] or 'full'")
    return value
