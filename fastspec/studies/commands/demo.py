"""`fastspec demo`: the head alone, both paths of the spectral method and LoRA learn a task, in minutes."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from fastspec.availability import install_advice
from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.data import ENVIRONMENT, load
from fastspec.studies.glue.presets import PRESETS
from fastspec.studies.glue.result import compare
from fastspec.studies.glue.tasks import EMBEDDED, TASKS, score_task
from fastspec.studies.glue.timing import FLOOR, StepTime

GUESS, HEAD = "the commonest answer", "the head alone"
FAST, REFERENCE, LORA = "spectral, fast path", "spectral, reference path", "LoRA r8"
SMOOTHING = 10


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to train, so that the whole demo takes about five minutes on two cores."""

    rows: int
    epochs: int
    batch_size: int


SST2_SIZE = Size(rows=2000, epochs=4, batch_size=32)
SWAP_SIZE = Size(rows=2400, epochs=4, batch_size=32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finetune MiniLM by its head alone, by its spectral coefficients on the fast and on the reference "
        "path, and by LoRA, from one seed; print a table and draw loss and score. The task is SST-2 where "
        "a GLUE folder is named, else sentences from Python's own documentation."
    )
    add = parser.add_argument
    add("--data", metavar="DIR", help=f"GLUE folder (default: ${ENVIRONMENT})")
    add("--model", help="folder or hub name (default: the MiniLM of the extra demo)")
    add("--output", default="runs/demo", metavar="DIR", help="default: %(default)s")
    add(
        "--rows", type=int, help="training rows (default: 2000 of SST-2, 2400 of the embedded task)"
    )
    add("--epochs", type=int, help="default: 4")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--debug", action="store_true", help="show the traceback of an error")


def main(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    try:
        import matplotlib  # noqa: F401  needed at the end; better to say so now
    except ImportError as e:
        raise ImportError(f"fastspec demo needs matplotlib ({e}); {install_advice('demo')}") from e
    from fastspec.studies.glue.finetune import run
    from fastspec.studies.glue.timing import step_times

    configs = configurations(args)
    output = Path(args.output)
    picture = output / "learning.png"
    # drawn last, so it tells a finished demo, which starts afresh, from one to go on with
    afresh = picture.exists()
    picture.unlink(missing_ok=True)
    results = {
        label: run(config, output / config.folder_name(), overwrite=afresh)
        for label, config in configs.items()
    }
    print("timing single steps, the methods in turn ...")
    times = step_times(configs, rounds=6, warmup=1)
    guess = commonest(configs[HEAD])
    draw(results, guess, picture)
    print()
    print(table(results, guess, times))
    print()
    print("fast path against reference path, same seed:")
    print(compare(results[REFERENCE], results[FAST]))
    print()
    print(f"loss and score over steps: {picture.resolve()}")
    print(f"results and adapters: {output.resolve()}")
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0


def configurations(args: argparse.Namespace) -> dict[str, GlueConfig]:
    """The demo's runs by label: all on the same rows, seed and number of steps."""
    real = bool(args.data or os.environ.get(ENVIRONMENT))
    size = SST2_SIZE if real else SWAP_SIZE
    common: dict[str, Any] = {
        "task": "sst2" if real else EMBEDDED.name,
        "model": args.model,
        "data": args.data,
        "seed": args.seed,
        "max_train_rows": args.rows or size.rows,
        "epochs": args.epochs or size.epochs,
        "batch_size": size.batch_size,
        "train_pooler": True,
    }
    # few steps, so rates at the upper end of what longer runs take (docs/results.md)
    ours: dict[str, Any] = {**PRESETS["values"], "lr": 1e-2, **common}
    return {
        HEAD: GlueConfig(method="head", lr=3e-3, **common),
        FAST: GlueConfig(**ours),
        REFERENCE: GlueConfig(path="reference", **ours),
        LORA: GlueConfig(method="lora", lora_rank=8, lr=2e-3, **common),
    }


def commonest(config: GlueConfig) -> float:
    """The dev score of always giving the commonest answer, in points."""
    source = load(TASKS[config.task], config.data)
    labels = {name: split.labels or [] for name, split in source.dev.items()}
    return max(
        score_task(source.task, {n: [i] * len(v) for n, v in labels.items()}, labels)["score"]
        for i in range(source.task.num_labels)
    )


def table(results: dict[str, dict[str, Any]], guess: float, times: dict[str, StepTime]) -> str:
    """The results side by side, as text."""
    header = ("", "last", "best", "trained", "head", "step time", "on disk")
    rows = [header, (GUESS, f"{guess:.1f}", f"{guess:.1f}", "", "", "", "")]
    for label, result in results.items():
        rows.append(
            (
                label,
                f"{result['last']['score']:.1f}",
                f"{result['best']['score']:.1f}",
                f"{result['parameters']['adapter']:,}",
                f"{result['parameters']['head']:,}",
                f"{times[label].ratio:.2f}",
                f"{result['adapter']['bytes'] / 1000:.1f} kB",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    first = next(iter(results.values()))
    rows_used = first["data"]["rows"]
    caption = (
        f"{first['data']['task']} ({first['data']['where']}), {rows_used['trained on']:,} training rows, "
        f"{first['config']['epochs']} epochs, one seed; last, best: dev score of that epoch in points, "
        f"{sum(n for split, n in rows_used.items() if 'train' not in split):,} rows;\n"
        "trained: parameters beside the head; on disk: adapter and head; step time: median ratio to "
        f"the {FLOOR}'s step ({times[FLOOR].milliseconds:.0f} ms here),\n"
        "the same model with everything frozen but the head and a shift of the embeddings; single "
        "steps of all methods in turn on the same batches, in one process"
    )
    return "\n".join([*lines, "", caption])


def draw(results: dict[str, dict[str, Any]], guess: float, path: Path) -> None:
    """Training loss and dev score of all runs over their steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = {
        HEAD: ("0.5", "-"),
        FAST: ("C0", "-"),
        REFERENCE: ("C1", "--"),
        LORA: ("C2", "-"),
    }
    for label, result in results.items():
        colour, line = styles[label]
        losses = result["losses"]
        steps = range(1, len(losses) + 1)
        left.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        left.plot(steps, running_mean(losses, SMOOTHING), line, color=colour, label=label)
        epochs = result["epochs"]
        places = [e["epoch"] * len(losses) / len(epochs) for e in epochs]
        right.plot(
            places, [e["score"] for e in epochs], line, color=colour, marker="o", label=label
        )
    right.axhline(guess, color="0.4", linestyle=":", label=GUESS)
    left.set(
        xlabel="training step",
        ylabel="cross-entropy loss [nats]",
        title=f"training loss (bold: mean of the last {SMOOTHING} steps)",
    )
    right.set(
        xlabel="training step",
        ylabel="score [points]",
        title="dev score after every epoch",
        xlim=left.get_xlim(),
    )
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def running_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to `width - 1` before it."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means
