"""`fastspec analyze`: the experiments behind the method, on models of your own."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastspec.cores import CORES
from fastspec.studies.glue.tasks import TASKS
from fastspec.svd.cli import EXCLUDE

KINDS = ("attention", "mlp", "other")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What finetuning does to singular vectors, and what the vectors do for a task. A checkpoint is a "
        "safetensors or torch.save file, a folder of them, or a finished run of fastspec glue; a RUN is "
        "the last of these. Tables and pictures go to OUTPUT. docs/studies.md names every experiment."
    )
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)

    weights = what.add_parser(
        "weights", help="alignment, stability profile and update of two checkpoints"
    )
    add = weights.add_argument
    add("before", help="a checkpoint; given alone, a RUN, from its first weights to its last")
    add("after", nargs="?", help="another checkpoint of the same architecture")
    add("--include", default="", help="regex: only matrices whose name it finds")
    add("--exclude", default=EXCLUDE, help="regex: not those whose name it finds (%(default)s)")
    add("--gap", type=float, default=0.01, help="relative gap within a cluster (%(default)s)")

    swap = what.add_parser(
        "swap", help="score a RUN with other singular vectors in place of its own"
    )
    swap.add_argument("run")
    swap.add_argument(
        "--other", metavar="RUN", help="a run of another task, whose vectors to use too"
    )
    mask = what.add_parser("mask", help="score a RUN without its leading or trailing triplets")
    mask.add_argument("run")
    for scored in (swap, mask):
        add = scored.add_argument
        add("--shares", type=float, nargs="+", help="of the triplets of every matrix, in (0, 1]")
        add("--kinds", nargs="+", choices=KINDS, default=KINDS[:2], help="(attention mlp)")
        add("--rows", type=int, help="score on the first so many dev rows only")
        add("--data", metavar="DIR", help="GLUE folder (default: the run's own)")
        add("--seed", type=int, default=0, help="of random vectors (%(default)s)")

    gradients = what.add_parser(
        "gradients", help="finetune and record the summed gradients' spectra"
    )
    add = gradients.add_argument
    add("--task", choices=list(TASKS), required=True)
    add("--model", help="folder or hub name (default: the MiniLM of the extra demo)")
    add("--data", metavar="DIR", help="GLUE folder")
    add("--start", choices=("pretrained", "random"), default="pretrained")
    add("--labels", choices=("true", "random"), default="true")
    add("--lr", type=float, default=1e-4, help="of full finetuning (%(default)s)")
    add("--epochs", type=int, default=1, help="%(default)s")
    add("--max-train-rows", type=int)
    add("--seed", type=int, default=0, help="%(default)s")
    add(
        "--steps",
        type=int,
        nargs="+",
        default=[1, 10, 100],
        help="to record after, besides the last",
    )

    runs = what.add_parser(
        "runs", help="stability of many RUNs, and whether it goes with their scores"
    )
    runs.add_argument("runs", nargs="+", metavar="RUN")

    ranks = what.add_parser(
        "ranks", help="spread a budget of coefficients over the layers by gradient energy"
    )
    add = ranks.add_argument
    add("--task", choices=list(TASKS), required=True)
    add("--model", help="folder or hub name (default: the MiniLM of the extra demo)")
    add("--data", metavar="DIR", help="GLUE folder")
    add("--core", choices=CORES, default="dense", help="%(default)s")
    add(
        "--rank", type=int, default=32, help="of every layer, before; sets the budget (%(default)s)"
    )
    add("--batches", type=int, default=16, help="of 32 training rows (%(default)s)")
    add("--seed", type=int, default=0, help="of the head (%(default)s)")

    scale = what.add_parser("pretraining", help="stability against the amount of pretraining data")
    add = scale.add_argument
    add("--source", choices=("digits", "cifar10"), default="digits", help="%(default)s")
    add("--sizes", type=int, nargs="+", help="numbers of pretraining images")
    add("--seeds", type=int, nargs="+")
    add("--steps", type=int, help="of pretraining")

    for each in (weights, swap, mask, gradients, runs, ranks, scale):
        each.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
        each.add_argument(
            "-o", "--output", type=Path, metavar="DIR", help="default: runs/analyze-WHAT"
        )


def main(args: argparse.Namespace) -> int:
    output = args.output or Path("runs") / f"analyze-{args.what}"
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    STUDIES[args.what](args, output)
    print(f"\ntables and pictures: {output}")
    return 0


def _weights(args: argparse.Namespace, output: Path) -> None:
    from fastspec.studies.analyze import plots, tables
    from fastspec.studies.analyze.alignment import align, by_kind
    from fastspec.studies.analyze.weights import load_weights, pairs

    if args.after is None:
        from fastspec.studies.glue.build import starting_weights

        before, after = starting_weights(args.before), load_weights(args.before)
    else:
        before, after = load_weights(args.before), load_weights(args.after)
    found = align(pairs(before, after, include=args.include, exclude=args.exclude), args.gap)
    rows = [a.summary() for a in found]
    _write(output, "matrices", rows)
    print()
    _write(output, "kinds", by_kind(found))
    tables.write_csv(output / "vectors.csv", [line for a in found for line in a.vectors()])
    plots.draw_alignment(found, output / "alignment.png")
    plots.draw_profile(found, output / "profile.png")
    plots.draw_update(found, output / "update.png")


def _swap(args: argparse.Namespace, output: Path) -> None:
    from fastspec.studies.analyze import plots
    from fastspec.studies.analyze.transplant import OTHER, PRETRAINED, swap
    from fastspec.studies.glue.build import effective_weights, finished, starting_weights

    model, score, ylabel = _scored_run(args)
    sources = {PRETRAINED: starting_weights(args.run)}
    if args.other:
        sources[OTHER] = effective_weights(finished(args.other).model)
    options = {"shares": args.shares} if args.shares else {}
    found = list(swap(model, score, sources, kinds=args.kinds, seed=args.seed, **options))
    _write(output, "swap", [dataclasses.asdict(s) for s in found])
    xlabel = "leading vectors replaced, per cent of all"
    plots.draw_scores(found, output / "swap.png", "other vectors, own coefficients", xlabel, ylabel)


def _mask(args: argparse.Namespace, output: Path) -> None:
    from fastspec.studies.analyze import plots
    from fastspec.studies.analyze.transplant import mask

    model, score, ylabel = _scored_run(args)
    options = {"shares": args.shares} if args.shares else {}
    found = list(mask(model, score, kinds=args.kinds, **options))
    _write(output, "mask", [dataclasses.asdict(s) for s in found])
    xlabel = "triplets dropped, per cent of all"
    plots.draw_scores(found, output / "mask.png", "triplets dropped from one end", xlabel, ylabel)


def _gradients(args: argparse.Namespace, output: Path) -> None:
    from fastspec.studies.analyze import plots
    from fastspec.studies.analyze.gradients import CumulativeGradients
    from fastspec.studies.glue.config import GlueConfig
    from fastspec.studies.glue.finetune import run

    fields = ("task", "model", "data", "start", "labels", "lr", "epochs", "max_train_rows", "seed")
    config = GlueConfig(method="full", **{name: getattr(args, name) for name in fields})
    recorder = CumulativeGradients(tuple(args.steps))
    # from the beginning: a sum can't be taken up half way
    run(config, output / "run", overwrite=True, callbacks=[recorder])
    _write(output, "gradients", [g.summary() for g in recorder.spectra])
    plots.draw_gradients(recorder.spectra, output / "gradients.png")


def _runs(args: argparse.Namespace, output: Path) -> None:
    from fastspec.studies.analyze import plots
    from fastspec.studies.analyze.stability import (
        FEWEST_RUNS,
        align_run,
        comparable,
        generalisation,
    )

    found = [align_run(folder) for folder in args.runs]
    _write(output, "runs", [run.summary() for run in found])
    plots.draw_runs(found, output / "runs.png")
    if len(comparable(found)) < FEWEST_RUNS:
        print(
            f"\nno correlations: they take {FEWEST_RUNS} runs or more, each of which shares task, labels "
            "and start with another"
        )
        return
    correlations = sorted(generalisation(found), key=lambda c: c.p)
    if correlations:
        print()
        _write(output, "generalisation", [dataclasses.asdict(c) for c in correlations])


def _ranks(args: argparse.Namespace, output: Path) -> None:
    from fastspec.files import write_json
    from fastspec.studies.analyze.ranks import allocate, coefficient_energy, patterns
    from fastspec.studies.glue.build import prepare
    from fastspec.studies.glue.config import GlueConfig
    from fastspec.studies.glue.evaluate import labelled_batches

    fields = ("task", "model", "data", "core", "rank", "seed")
    config = GlueConfig(train_pooler=True, **{name: getattr(args, name) for name in fields})
    prepared = prepare(dataclasses.replace(config, method="full"))
    spectral = config.spectral(prepared.heads)
    rows = prepared.source.train.head(config.batch_size * args.batches)
    inputs = labelled_batches(prepared.tokenizer, rows, config.max_length, config.batch_size)
    energy = coefficient_energy(prepared.model, spectral, inputs)
    ranks = allocate(prepared.model, spectral, energy)
    whole = sum(energy.values())
    lines = [
        {"layer": name, "share of the energy": energy[name] / whole, "rank": rank}
        for name, rank in ranks.items()
    ]
    _write(output, "ranks", lines)
    write_json(output / "ranks.json", patterns(ranks))


def _pretraining(args: argparse.Namespace, output: Path) -> None:
    from fastspec.studies.analyze import plots
    from fastspec.studies.analyze.pretraining import Study, run

    given = {
        "sizes": args.sizes and tuple(args.sizes),
        "seeds": args.seeds and tuple(args.seeds),
        "pretraining_steps": args.steps,
    }
    study = Study(source=args.source, **{k: v for k, v in given.items() if v})
    rows = list(run(study))
    print()
    _write(output, "pretraining", rows)
    plots.draw_scale(rows, output / "pretraining.png")


def _scored_run(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """The plain model of a run, the function that scores it on the run's task, and the score's name."""
    from fastspec.studies.glue import data
    from fastspec.studies.glue.build import merged
    from fastspec.studies.glue.evaluate import Scorer

    built = merged(args.run)
    source = data.load(TASKS[built.config.task], args.data or built.config.data)
    scorer = Scorer(source, built.tokenizer, max_length=built.config.max_length, rows=args.rows)
    name = f"{source.task.name}: {' and '.join(source.task.metrics)} [points], dev rows"
    return built.model, lambda model: scorer(model)["score"], name


def _write(output: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print a table, and write it as Markdown and CSV."""
    from fastspec.files import write_atomically
    from fastspec.studies.analyze import tables

    text = tables.markdown(rows)
    print(text)
    write_atomically(output / f"{name}.md", (text + "\n").encode())
    tables.write_csv(output / f"{name}.csv", rows)


STUDIES = {
    "weights": _weights,
    "swap": _swap,
    "mask": _mask,
    "gradients": _gradients,
    "runs": _runs,
    "ranks": _ranks,
    "pretraining": _pretraining,
}
