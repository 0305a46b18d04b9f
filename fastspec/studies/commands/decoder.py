"""`fastspec decoder`: held-out loss of a finetuned decoder, by method, at searched learning rates."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastspec import progress
from fastspec.files import write_atomically
from fastspec.fingerprint import combined_fingerprint, tensor_fingerprint
from fastspec.model.rates import default_rate
from fastspec.studies.decoder import record, text
from fastspec.studies.decoder.finetune import adapt, held_out_loss, load, train
from fastspec.studies.decoder.record import Run
from fastspec.studies.decoder.rows import PRETRAINED, ROWS, Row
from fastspec.studies.encoders import go_offline_if, public_name, quiet, resolve

DIGITS = 16  # of a SHA-256 in hexadecimal: enough to tell two apart
HELD_OUT_SEED = 0
BEGIN, END = "<!-- decoder -->", "<!-- end -->"  # of the table on a page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.description = (
        "Finetune a decoder on Python's own documentation by spectral coefficients, bands, dense cores and "
        "LoRA, each at its best learning rate, and print their loss on held-out files. Every finished run "
        "is a line of the record, from which the study goes on after it was stopped."
    )
    add = parser.add_argument
    add("--model", help="folder (safetensors or GGUF) or hub name of a causal language model")
    add("--record", type=Path, default=Path("runs/decoder.csv"), help="default: %(default)s")
    add("--report", action="store_true", help="print the table of the record and run nothing")
    add("--page", type=Path, help="a Markdown page: its table is brought up to date as well")
    add("--rows", nargs="+", metavar="NAME", help="only these rows of the table")
    add("--steps", type=int, default=30, help="of training (%(default)s)")
    add("--batch", type=int, default=4, help="blocks a step (%(default)s)")
    add("--length", type=int, default=128, help="tokens a block (%(default)s)")
    add("--held-out", type=int, default=48, help="blocks the loss is taken on (%(default)s)")
    add("--threads", type=int, help="of PyTorch")
    add("--debug", action="store_true", help="show the traceback of an error")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    rows = _rows(args.rows)
    if not args.report:
        if args.model is None:
            raise ValueError("name a model with --model, or print a record with --report")
        with quiet():
            _run_all(rows, args)
    table = record.table(rows, record.read(args.record))
    print(table)
    if args.page is not None:
        put_into(args.page, table)
    return 0


def put_into(page: Path, table: str) -> None:
    """Replace what stands between the page's marks by the table.

    Raises:
        ValueError: the page has no such marks.
    """
    text = page.read_text("utf-8")
    before, first, rest = text.partition(f"{BEGIN}\n")
    _, last, after = rest.partition(END)
    if not first or not last:
        raise ValueError(f"{page} has no place for the table: a line {BEGIN}, later a line {END}")
    write_atomically(page, f"{before}{first}{table}\n{last}{after}".encode())


def _rows(names: Sequence[str] | None) -> list[Row]:
    known = {row.name: row for row in ROWS}
    unknown = next((name for name in names or () if name not in known), None)
    if unknown is not None:
        raise ValueError(f"--rows: no row is named {unknown!r}; there are: {'; '.join(known)}")
    return [row for row in ROWS if names is None or row.name in names]


def _run_all(rows: Sequence[Row], args: argparse.Namespace) -> None:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    name = resolve(args.model)
    go_offline_if(name != args.model or Path(name).is_dir())
    training, held = text.texts()
    model, tokenizer = load(name)
    weights = {n: tensor_fingerprint(p) for n, p in model.named_parameters()}
    common = {
        "total": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "batch": args.batch,
        "length": args.length,
        "held_out": args.held_out,
        "model": f"{public_name(name)} {combined_fingerprint(weights)[:DIGITS]}",
        "text": text.digest(training, held)[:DIGITS],
    }
    judged = text.blocks(held, tokenizer, args.held_out, args.length, HELD_OUT_SEED)

    if not any(run.row == PRETRAINED for run in record.read(args.record)):
        loss = round(held_out_loss(model, judged), 5)
        record.add(args.record, Run(PRETRAINED, 0.0, 0, None, loss, 0, **common))
    while (job := record.next_run(rows, record.read(args.record))) is not None:
        row, rate, seed = job
        began = time.perf_counter()
        model, groups = adapt(load(name)[0], row, rate, seed)
        ours = row.method == "spectral" and row.core_map is None
        default = default_rate(model) if ours else None
        trained = sum(p.numel() for group in groups for p in group["params"])
        order = text.blocks(training, tokenizer, args.steps * args.batch, args.length, seed)
        batches = order.reshape(args.steps, args.batch, args.length)
        what = f"{row.name}, rate {rate:g}, seed {seed}"
        with progress.bar(args.steps, what, "step", leave=False) as bar:

            def announce(step: int, loss: float, bar: Any = bar) -> None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update(step - bar.n)

            finite = train(model, groups, batches, announce)
        loss = round(held_out_loss(model, judged), 5) if finite else math.nan
        kept = loss if math.isfinite(loss) else None
        record.add(args.record, Run(row.name, rate, seed, default, kept, trained, **common))
        result = "diverged" if kept is None else f"held-out loss {loss:.4f}"
        if progress.level() != "quiet":
            print(f"{what}: {result}, {time.perf_counter() - began:.0f} s", flush=True)
