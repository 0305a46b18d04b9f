"""`fastspec glue`: one finetuning run from the command line."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from fastspec.config import CORES
from fastspec.glue.config import METHODS, GlueConfig
from fastspec.glue.record import compare, read_result, table
from fastspec.glue.tasks import TASKS

_DEFAULTS = {f.name: f.default for f in dataclasses.fields(GlueConfig) if f.name != "task"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finetune a pretrained encoder on one GLUE task and score it after every epoch. The same "
        "command after an interruption continues the run. Results go to OUTPUT/result.json."
    )
    add = parser.add_argument
    add("--task", choices=list(TASKS), help="what to finetune on; swap is the embedded task")
    add("--compare", nargs=2, metavar=("A", "B"), help="compare two results and do nothing else")
    add(
        "--table",
        nargs="+",
        metavar="RUN",
        help="print finished runs as a table and do nothing else",
    )
    add(
        "--method",
        choices=METHODS,
        default="spectral",
        help="what is trained (default: %(default)s)",
    )
    add("--model", help="folder or hub name (default: the MiniLM of fastspec[demo])")
    add(
        "--data",
        metavar="DIR",
        help="folder of <Task>/train.tsv, dev.tsv (default: $FASTSPEC_GLUE_DIR, else the hub, else "
        "sentences from Python's own documentation)",
    )
    add("--output", metavar="DIR", help="default: runs/<task>-<method>-seed<seed>")
    add("--overwrite", action="store_true", help="drop what an earlier run left in OUTPUT")

    spectral = parser.add_argument_group("spectral")
    add = spectral.add_argument
    add("--path", choices=("fast", "reference"), default="fast", help="default: %(default)s")
    add("--rank", type=parse_rank, default=32, help="a count, a fraction such as 0.5, or full")
    add("--core", choices=CORES, default="diag", help="default: %(default)s")
    add("--half-width", type=int, default=1, help="of --core band (default: %(default)s)")
    add("--select", type=parse_select, default="leading", help="leading, trailing or START:STOP")
    add("--basis", choices=("svd", "random"), default="svd", help="random is the control")
    add("--target-modules", default="all-linear", help="a regular expression over module names")
    add("--train-bias", action="store_true", help="also train biases of adapted layers")
    add("--train-layernorm", action="store_true", help="also train LayerNorm")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--lora-rank", type=int, default=8, help="of lora and pissa (default: %(default)s)")
    add("--lr", type=float, help="of what the method trains (default: per method, docs/glue.md)")
    add("--head-lr", type=float, help="of the head (default: 1e-3)")
    add("--bias-lr", type=float, help="of biases and LayerNorm beside coefficients (default: 1e-3)")
    for name, kind, text in (
        ("weight_decay", float, "of trained matrices other than coefficients"),
        ("coefficient_decay", float, "of coefficients, towards the pretrained spectrum"),
        ("warmup", float, "share of the steps in which the rates rise"),
        ("epochs", int, "passes over the training rows"),
        ("batch_size", int, "rows a step"),
        ("max_length", int, "tokens a row; what is longer is cut"),
        ("seed", int, "of the head, the order of rows, dropout and random bases"),
        ("save_steps", int, "steps between checkpoints"),
    ):
        flag = "--" + name.replace("_", "-")
        add(flag, type=kind, default=_DEFAULTS[name], help=f"{text} (default: %(default)s)")
    add("--max-train-rows", type=int, help="train on the first so many rows only")
    add("--threads", type=int, help="torch threads (default: torch's own choice)")
    add("--debug", action="store_true", help="show the traceback of an error")


def parse_rank(text: str) -> int | float | str:
    """ "full", a count or a fraction; the range is checked by `SpectralConfig`."""
    if text == "full":
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a count, a fraction or full, got {text!r}"
        ) from None


def parse_select(text: str) -> str | tuple[int, int]:
    if text in ("leading", "trailing"):
        return text
    start, colon, stop = text.partition(":")
    if colon and start.isdecimal() and stop.isdecimal():
        return int(start), int(stop)
    raise argparse.ArgumentTypeError(f"expected leading, trailing or START:STOP, got {text!r}")


def main(args: argparse.Namespace) -> int:
    if args.compare:
        print(compare(*map(read_result, args.compare)))
        return 0
    if args.table:
        print(table([read_result(path) for path in args.table]))
        return 0
    if args.task is None:
        raise ValueError(f"--task is missing, expected one of {', '.join(TASKS)}")
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(GlueConfig)}
    config = GlueConfig(**fields)
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    from fastspec.glue.train import run

    print(summary(run(config, args.output, overwrite=args.overwrite)))
    return 0


def summary(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    from fastspec.glue.trainer import describe_scores

    parameters = result["parameters"]
    lines = []
    for name in ("last", "best"):
        scores = {k: v for k, v in result[name].items() if k != "epoch"}
        lines.append(f"{name} epoch ({result[name]['epoch']}): {describe_scores(scores)}")
    lines.append(
        f"trained: {parameters['adapter']:,} and a head of {parameters['head']:,} out of "
        f"{parameters['total']:,} parameters; {result['adapter']['bytes'] / 1000:.1f} kB in "
        f"{result['adapter']['folder']}; median step {result['step_ms']:.0f} ms"
    )
    return "\n".join(lines)
