"""`fastspec glue`: one finetuning run from the command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fastspec import progress
from fastspec.cores import CORES
from fastspec.studies.glue.config import CORE_MAPS, LABELS, METHODS, RATE_RULES, START, GlueConfig
from fastspec.studies.glue.presets import PRESETS
from fastspec.studies.glue.result import compare, read_json, read_result, table
from fastspec.studies.glue.table_rows import SUITES, TASK_SIZES
from fastspec.studies.glue.tasks import TASKS

_SUITE_ONLY = {"tasks", "rows", "seeds", "record", "jobs", "report", "time"}
_WITH_SUITE = {*_SUITE_ONLY, "suite", "path", "model", "data", "output", "threads", "bf16", "debug"}
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(GlueConfig) if f.name != "task"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finetune a pretrained encoder on one GLUE task and score it after every epoch. The same "
        "command after an interruption continues the run. Results go to OUTPUT/result.json."
    )
    parser.register("action", None, Stored)
    add = parser.add_argument
    add("--task", choices=list(TASKS), help="what to finetune on; swap is the embedded task")
    add(
        "--preset",
        choices=list(PRESETS),
        action=Preset,
        help="a named configuration of the spectral method; flags after it override it",
    )
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
    add("--model", help="folder or hub name (default: the MiniLM of the extra demo)")
    add(
        "--data",
        metavar="DIR",
        help="folder of <Task>/train.tsv, dev.tsv (default: $FASTSPEC_GLUE_DIR, else the hub, else "
        "sentences from Python's own documentation)",
    )
    add(
        "--output",
        metavar="DIR",
        help="default: runs/<task>-<method>-seed<seed>, with --suite runs/suite",
    )
    add("--overwrite", action="store_true", help="drop what an earlier run left in OUTPUT")

    suite = parser.add_argument_group(
        "suite",
        "A whole table: every missing run is made, then the table is printed and written to "
        "OUTPUT/report-SUITE with a CSV file and a picture. Of the other options only --model, --data, "
        "--output, --threads (of all processes together), --bf16 and --path apply: --path reference adds a "
        "row of the reference path to every spectral row.",
    )
    add = suite.add_argument
    add("--suite", choices=list(SUITES), help="which rows (docs/glue.md)")
    add("--tasks", nargs="+", choices=list(TASKS), help="default: " + " ".join(TASK_SIZES))
    add("--rows", nargs="+", metavar="ROW", help="only these rows, and those they need")
    add("--seeds", type=int, help="at most so many seeds a row")
    add(
        "--record",
        type=Path,
        metavar="CSV",
        help="runs made anywhere, a line each: they are not made again, and new ones are added",
    )
    add("--jobs", type=int, help="runs at a time (default: one a core, at most 8; 1 with a GPU)")
    add("--report", action="store_true", help="make no run; report what is finished")
    add("--time", action="store_true", help="then time single steps of all rows, alone; minutes")

    spectral = parser.add_argument_group("spectral")
    add = spectral.add_argument
    add("--path", choices=("fast", "reference"), default="fast", help="default: %(default)s")
    add(
        "--rank",
        type=parse_rank,
        default=32,
        help="a count, a fraction such as 0.5, full, or ranks.json of fastspec analyze ranks",
    )
    add("--core", choices=CORES, default="diag", help="default: %(default)s")
    add("--half-width", type=int, default=1, help="of --core band (default: %(default)s)")
    add("--core-rank", type=int, default=1, help="of --core low_rank (default: %(default)s)")
    add("--core-map", choices=CORE_MAPS, help="what makes the core from other trained numbers")
    add("--select", type=parse_select, default="leading", help="leading, trailing or START:STOP")
    add("--basis", choices=("svd", "random"), default="svd", help="random is a control")
    add(
        "--basis-model",
        help="take the singular vectors of another model's weights: random for an "
        "untrained one, gradient for the task's own gradient, or the folder of a finished run",
    )
    add(
        "--rate-rule",
        choices=RATE_RULES,
        default="flat",
        help="spectrum: rates in proportion to singular values (default: %(default)s)",
    )
    add(
        "--target-modules",
        default="all-linear",
        help="attention, values (with the output projection), mlp, or a regular expression over module "
        "names; of lora and pissa too",
    )
    add("--train-bias", action="store_true", help="also train biases of adapted layers")
    add("--train-layernorm", action="store_true", help="also train LayerNorm")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--lora-rank", type=int, default=8, help="of lora and pissa (default: %(default)s)")
    add("--lr", type=float, help="of what the method trains (default: per method, docs/glue.md)")
    add(
        "--train-pooler",
        action="store_true",
        help="train the pooler whole, as part of the head: where pretraining left it untouched, as in "
        "the default model",
    )
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
    add(
        "--start",
        choices=START,
        default="pretrained",
        help="random: from an untrained model (default: %(default)s)",
    )
    add(
        "--labels",
        choices=LABELS,
        default="true",
        help="random: permute the training labels (default: %(default)s)",
    )
    add("--max-train-rows", type=int, help="train on the first so many rows only")
    add("--bf16", action="store_true", help="products in bfloat16, under autocast")
    add("--threads", type=int, help="torch threads (default: torch's own choice)")
    add("--debug", action="store_true", help="show the traceback of an error")


class Stored(argparse.Action):
    """Stores a value, and its name in `given`: what was said is no default even if it equals it."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace.given = {*getattr(namespace, "given", ()), self.dest}


class Preset(Stored):
    """Sets the fields of a preset, so that what is said after it has the last word."""

    def __call__(self, parser, namespace, values, option_string=None):
        super().__call__(parser, namespace, values, option_string)
        for name, value in PRESETS[values].items():
            setattr(namespace, name, value)


def parse_rank(text: str) -> Any:
    """ "full", a count, a fraction or a file of ranks by pattern; `SpectralConfig` checks the values."""
    if text.endswith(".json"):
        try:
            return read_json(Path(text))
        except OSError as e:
            raise argparse.ArgumentTypeError(str(e)) from None
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
    given = {*getattr(args, "given", ()), *(name for name, v in vars(args).items() if v is True)}
    if args.suite:
        _refuse(given - _WITH_SUITE, "does not apply to --suite, whose rows decide it")
        return run_suite(args)
    _refuse(given & _SUITE_ONLY, "applies to --suite only")
    if args.task is None:
        raise ValueError(f"--task is missing, expected one of {', '.join(TASKS)}")
    if args.core != "band" and "half_width" not in given:
        # a preset's, whose core another took the place of
        args.half_width = _DEFAULTS["half_width"]
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(GlueConfig)}
    config = GlueConfig(**fields)
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    from fastspec.studies.glue.finetune import run

    told = progress.level() != "quiet"
    print(summary(run(config, args.output, overwrite=args.overwrite, progress=told)))
    return 0


def _refuse(names: set[str], why: str) -> None:
    if names:
        raise ValueError(f"--{min(names).replace('_', '-')} {why}")


def run_suite(args: argparse.Namespace) -> int:
    """Make the missing runs of a suite, time them if asked, write and print its report."""
    import torch

    from fastspec.files import write_json
    from fastspec.studies.analyze.stability import align_run
    from fastspec.studies.glue import report
    from fastspec.studies.glue.processes import make
    from fastspec.studies.glue.suite import Suite
    from fastspec.studies.glue.table_rows import SUITE_SIZES, choose, with_reference

    threads = args.threads or torch.get_num_threads()
    jobs = args.jobs or (1 if torch.cuda.is_available() else min(threads, 8))
    if not 1 <= jobs <= threads:
        raise ValueError(
            f"--jobs must be from 1 to the number of threads, {threads}, which its runs share; got {jobs}"
        )
    rows = choose(args.suite, args.rows, args.model)
    sizes = SUITE_SIZES.get(args.suite, TASK_SIZES)
    output = Path(args.output or "runs/suite")
    suite = Suite(
        output=output,
        rows=with_reference(rows) if args.path == "reference" else rows,
        tasks=tuple(args.tasks or sizes),
        sizes=sizes,
        model=args.model,
        data=args.data,
        seeds=args.seeds,
        record=args.record,
        overrides={"bf16": True} if args.bf16 else {},
    )
    stale = suite.stale()
    if stale:
        print(
            f"{args.record}: lines that don't count, because this suite has another command for their "
            f"run: {len(stale)} (the first: {stale[0].where()})"
        )
    folder = output / f"report-{args.suite}"
    if not args.report:
        announce = print if progress.level() != "quiet" else lambda text: None
        make(suite, jobs, max(1, threads // jobs), announce)
    if args.time:
        from fastspec.studies.glue.timing import step_times

        torch.set_num_threads(threads)
        times = step_times(suite.examples())
        write_json(folder / report.TIMING, {n: dataclasses.asdict(t) for n, t in times.items()})
    measure = (lambda run: align_run(run).summary()) if args.suite == "controls" else None
    print(report.write_report(suite, folder, measure))
    print(f"\n{folder / report.TABLE}, {report.RUNS}, {report.PICTURE}")
    return 0


def summary(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    from fastspec.studies.glue.trainer import describe_scores

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
