"""One run, from a configuration to a result file; started again after a kill, it goes on."""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from fastspec.files import is_unfinished, write_json
from fastspec.studies import encoders
from fastspec.studies.glue import donor_basis, methods
from fastspec.studies.glue.build import Prepared, prepare
from fastspec.studies.glue.config import GRADIENT, GlueConfig
from fastspec.studies.glue.data import Split
from fastspec.studies.glue.result import ADAPTER, DIVERGED, RESULT, environment, read_json
from fastspec.studies.glue.tasks import TASKS, predictions

if TYPE_CHECKING:
    from transformers import TrainerCallback

CONFIG = "config.json"
INPUTS = "inputs.json"
LOCK = ".lock"


def tokenise(tokenizer: Any, split: Split, max_length: int) -> Any:
    """A `datasets.Dataset`: the tokenizer's columns, "length" in tokens, "labels" if there are any."""
    from datasets import Dataset

    columns = dict(
        tokenizer(
            *map(list, zip(*split.texts, strict=True)), truncation=True, max_length=max_length
        )
    )
    columns["length"] = [len(ids) for ids in columns["input_ids"]]
    if split.labels is not None:
        columns["labels"] = split.labels
    return Dataset.from_dict(columns)


def run(
    config: GlueConfig,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Finetune, score and record one configuration; returns what `result.json` holds.

    A finished run of the same configuration in `output` is returned as it is, an unfinished one is
    continued from its last whole checkpoint, with the numbers of an uninterrupted run. Where another
    process makes the same run, this one waits for it. `callbacks` are transformers', called along with
    the run's own.

    Raises:
        ValueError: `output` holds a run of another configuration, or its rows or the pretrained
            model have changed since it was interrupted.
        DivergedError: the loss became NaN or infinite.
        DataError, FileNotFoundError: see `fastspec.studies.glue.data.load`.
    """
    folder = Path(output) if output else Path("runs") / config.folder_name()
    with _alone_in(folder, progress):
        return _run(config, folder, overwrite, progress, callbacks)


@contextlib.contextmanager
def _alone_in(folder: Path, progress: bool) -> Iterator[None]:
    """Two processes that make one run would write over each other's checkpoints: the second waits."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print(f"another process makes {folder}; waiting for it to end", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _run(
    config: GlueConfig,
    folder: Path,
    overwrite: bool,
    progress: bool,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    done = _claim(folder, config, overwrite)
    if done is not None:
        if progress:
            print(f"{folder / RESULT} is there already (--overwrite runs it again)")
        return done
    prepared = prepare(config)
    source = prepared.source
    _check_inputs(folder, prepared)
    train = source.train.head(config.max_train_rows)
    counts = methods.count_parameters(prepared.model, prepared.heads)
    if progress:
        print(f"data: {source.describe()}")
        if source.task is not TASKS[config.task]:
            print(f"      in place of {config.task}: no folder was named and the hub gave nothing")
        share = 100 * counts["adapter"] / counts["total"]
        print(
            f"{config.label()}: trains {counts['adapter']:,} parameters ({share:.3f} %) "
            f"and a head of {counts['head']:,}, out of {counts['total']:,}"
        )
    if config.basis_model == GRADIENT:
        batches = donor_basis.first_batches(prepared.tokenizer, train, config)
        donor_basis.use_gradients(prepared.model, batches, folder)
    with encoders.quiet():
        trainer = _trainer(config, prepared, train, folder, progress, callbacks)
    from transformers import set_seed

    from fastspec.studies.glue.trainer import DivergedError, last_checkpoint

    checkpoint = last_checkpoint(folder)
    if checkpoint is not None and progress:
        print(f"resuming from {checkpoint}")
    # building the methods has drawn different amounts of random numbers; dropout starts alike
    set_seed(config.seed)
    with encoders.quiet():
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except DivergedError as e:
            write_json(folder / DIVERGED, {"error": str(e)})
            raise
        _predict_unlabelled(trainer, prepared, config, folder)
    size = methods.save(prepared.model, config, folder / ADAPTER)
    result = _result(config, prepared, train, counts, trainer, folder)
    result["adapter"] = {"folder": str(folder / ADAPTER), "bytes": size}
    result["resumed_from"] = checkpoint.name if checkpoint else None
    write_json(folder / RESULT, result)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    return result


def _claim(folder: Path, config: GlueConfig, overwrite: bool) -> dict[str, Any] | None:
    """Make `folder` this configuration's; the finished result if it is there already."""
    fields = config.to_dict()
    if overwrite and (folder / CONFIG).exists():
        for path in [*folder.glob("checkpoint-*"), folder / "epochs", folder / ADAPTER]:
            shutil.rmtree(path, ignore_errors=True)
        for name in (RESULT, CONFIG, INPUTS, DIVERGED, donor_basis.FILE):
            (folder / name).unlink(missing_ok=True)
    if (folder / CONFIG).exists():
        # fields that an older version did not write have their default
        there = GlueConfig.from_dict(read_json(folder / CONFIG)).to_dict()
        differing = [k for k in fields if there.get(k) != fields[k]]
        if differing:
            what = ", ".join(f"{k} {there.get(k)!r} (asked: {fields[k]!r})" for k in differing)
            raise ValueError(
                f"{folder} holds a run with {what}; name another --output or pass --overwrite"
            )
        if (folder / RESULT).exists():
            return read_json(folder / RESULT)
    elif any(path.name != LOCK and not is_unfinished(path) for path in folder.iterdir()):
        raise ValueError(f"--output {folder} is not empty and holds no run; name another folder")
    write_json(folder / CONFIG, fields)
    return None


def _check_inputs(folder: Path, prepared: Prepared) -> None:
    """Refuse to go on with other rows or weights than the run in `folder` began with."""
    inputs = {"rows": prepared.source.to_dict()["sha256"], "model": prepared.fingerprint}
    path = folder / INPUTS
    there = read_json(path) if path.exists() else inputs
    differing = [name for name in inputs if there.get(name) != inputs[name]]
    if differing:
        raise ValueError(
            f"the {' and the '.join(differing)} changed since the run in {folder} began (now "
            f"{prepared.source.where}, {prepared.name}); name another --output or pass --overwrite"
        )
    write_json(path, inputs)


def _trainer(
    config: GlueConfig,
    prepared: Prepared,
    train: Split,
    folder: Path,
    progress: bool,
    callbacks: Sequence[TrainerCallback] = (),
):
    from transformers import DataCollatorWithPadding, TrainingArguments

    from fastspec.studies.glue.trainer import CheckpointSchedule, GlueTrainer, Progress

    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        train_sampling_strategy="group_by_length",
        warmup_steps=math.ceil(config.warmup * steps_per_epoch * config.epochs),
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="no",  # CheckpointSchedule decides
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,  # Progress shows the bars
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=config.bf16 and not torch.cuda.is_available(),  # else Trainer wants a GPU for it
    )
    source = prepared.source
    own: list[Any] = [CheckpointSchedule(config.save_steps, steps_per_epoch)]
    if progress:
        own.append(Progress(f"{config.task} {config.label()}"))
    return GlueTrainer(
        prepared.model,
        folder,
        args=arguments,
        train=tokenise(prepared.tokenizer, train, config.max_length),
        data_collator=DataCollatorWithPadding(prepared.tokenizer),
        processing_class=prepared.tokenizer,
        callbacks=[*own, *callbacks],
        glue=config,
        task=source.task,
        heads=prepared.heads,
        dev={n: tokenise(prepared.tokenizer, s, config.max_length) for n, s in source.dev.items()},
        dev_labels={n: s.labels or [] for n, s in source.dev.items()},
    )


def _predict_unlabelled(trainer, prepared: Prepared, config: GlueConfig, folder: Path) -> None:
    """Write `predictions-<split>.tsv` (index, prediction: the leaderboard's form)."""
    task = prepared.source.task
    for name, split in prepared.source.test.items():
        rows = tokenise(prepared.tokenizer, split, config.max_length)
        values = predictions(task, trainer.logits(rows).numpy())
        named = [task.labels[int(v)] if task.labels else v for v in values]
        lines = ["index\tprediction", *(f"{i}\t{v}" for i, v in enumerate(named))]
        (folder / f"predictions-{name}.tsv").write_text("\n".join(lines) + "\n", "utf-8")


def _result(
    config: GlueConfig,
    prepared: Prepared,
    train: Split,
    counts: dict[str, int],
    trainer,
    folder: Path,
) -> dict[str, Any]:
    from fastspec.studies.glue.trainer import read_epochs

    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    epochs = read_epochs(folder, config.epochs)
    last = epochs[-1]
    best = max(epochs, key=lambda e: e["metrics"]["score"])  # the first of equals
    task = prepared.source.task
    low, high = task.value_range
    source = prepared.source.to_dict()
    source["rows"]["trained on"] = len(train)
    return {
        "config": config.to_dict(),
        "label": config.label(),
        "rates": methods.rates(config),
        "rate_source": "given" if config.lr else methods.default_rate(config).source,
        "data": source,
        "model": {
            "name": prepared.name,
            "fingerprint": prepared.fingerprint,
            "heads": prepared.heads,
        },
        "parameters": counts,
        **environment(),
        "losses": [entry["loss"] for entry in steps],
        "step_ms": statistics.median(entry["step_ms"] for entry in steps),
        "epochs": [{"epoch": e["epoch"], **e["metrics"]} for e in epochs],
        "last": {"epoch": last["epoch"], **last["metrics"]},
        "best": {"epoch": best["epoch"], **best["metrics"]},
        "predictions": {"last": last["predictions"], "best": best["predictions"]},
        "regression_tolerance": 1e-3 * (high - low) if task.regression else 0.0,
    }
