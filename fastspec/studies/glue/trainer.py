"""The `transformers.Trainer` of `fastspec glue`: bucketed batches, small checkpoints, exact resumption."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from fastspec.files import write_json
from fastspec.progress import bar
from fastspec.studies.glue import methods
from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.optimizer import ScaledAdamW, spectral_scales
from fastspec.studies.glue.tasks import Task, predictions, score_task

WEIGHTS = "trained.safetensors"
COMPLETE = "complete"


class DivergedError(ValueError):
    """The training loss stopped being a number."""


class EpochLengthSampler(LengthGroupedSampler):
    """Rows of similar length together, in an order that depends on the seed and the epoch alone.

    So an epoch that is resumed half way sees the batches it would have seen.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        return super().__iter__()


class CheckpointSchedule(TrainerCallback):
    """Asks for a checkpoint every few steps and after each epoch's evaluation; marks whole ones.

    None is made at an epoch's last step before its evaluation: resuming there would skip that.
    """

    def __init__(self, every: int, steps_per_epoch: int) -> None:
        self.every = every
        self.steps_per_epoch = steps_per_epoch

    def on_step_end(self, args, state, control, **kwargs):
        inside = state.global_step % self.steps_per_epoch
        control.should_save = inside != 0 and inside % self.every == 0
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = True
        return control

    def on_save(self, args, state, control, **kwargs):
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class StepClock(TrainerCallback):
    """Wall time of the last training step in ms: forward, backward, optimiser; no data loading."""

    def __init__(self) -> None:
        self.milliseconds = math.nan
        self._began = math.nan

    def on_step_begin(self, args, state, control, **kwargs):
        _synchronise()
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        _synchronise()
        self.milliseconds = 1e3 * (time.perf_counter() - self._began)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Progress(TrainerCallback):
    """A line for every epoch's scores, and a bar for the steps with the running loss."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None
        self.prediction_bar: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = bar(state.max_steps, self.label, "step", initial=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            self.bar.set_postfix(
                epoch=f"{state.epoch:.2f}", loss=f"{logs['loss']:.4f}", refresh=False
            )
            self.bar.update(state.global_step - self.bar.n)
        elif "eval_score" in logs:
            self.bar.write(f"{self.label}: epoch {state.epoch:.0f}: {describe_scores(logs)}")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.prediction_bar is None:
            self.prediction_bar = bar(len(eval_dataloader), "scoring", "batch", leave=False)
        self.prediction_bar.update()

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def describe_scores(scores: dict[str, Any]) -> str:
    """Metrics as text, such as "accuracy 71.20, score 71.20"; a prefix "eval_" is dropped."""
    named = {k.removeprefix("eval_"): v for k, v in scores.items() if k not in ("epoch", "step")}
    return ", ".join(f"{name} {value:.2f}" for name, value in named.items())


class GlueTrainer(Trainer):
    """Trains one configuration and scores every dev split after each epoch.

    Args:
        network: the model, trainable parameters chosen.
        folder: where checkpoints and scores go.
        glue: the run's configuration.
        task: the task of the rows.
        heads: module names of the head.
        train: tokenised training rows.
        dev: tokenised dev splits, in file order.
        dev_labels: their labels.
    """

    def __init__(
        self,
        network: nn.Module,
        folder: Path,
        *,
        glue: GlueConfig,
        task: Task,
        heads: list[str],
        train: Dataset,
        dev: dict[str, Dataset],
        dev_labels: dict[str, list],
        **kwargs: Any,
    ) -> None:
        self.glue, self.task, self.heads = glue, task, heads
        self.network, self.folder = network, folder
        self.lengths = list(train["length"])
        self.dev, self.dev_labels = dev, dev_labels
        self.clock = StepClock()
        super().__init__(model=network, train_dataset=train, eval_dataset=dev, **kwargs)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(self.clock)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = methods.optimizer_groups(self.network, self.heads, self.glue)
            if self.glue.method == "spectral" and self.glue.rate_rule == "spectrum":
                self.optimizer = ScaledAdamW(groups, spectral_scales(self.network))
            else:
                self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochLengthSampler:
        # not read from `train_dataset`: Trainer drops the columns that forward doesn't take
        return EpochLengthSampler(self.args.train_batch_size, self.lengths, self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> SequentialSampler:
        return SequentialSampler(eval_dataset)

    def logits(self, rows: Dataset) -> torch.Tensor:
        """Logits [rows, num_labels] in file order, computed in order of length to save padding."""
        order = torch.tensor(rows["length"]).argsort(descending=True, stable=True)
        output = self.predict(rows.select(order.tolist()))
        logits = torch.from_numpy(output.predictions)
        unsorted = torch.empty_like(logits)
        unsorted[order] = logits
        return unsorted

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score every dev split, keep the predictions in `epochs/`, log the metrics."""
        predicted = {
            name: predictions(self.task, self.logits(rows).numpy())
            for name, rows in self.dev.items()
        }
        metrics = score_task(self.task, predicted, self.dev_labels)
        epoch = round(self.state.epoch or 0)
        write_json(
            epoch_file(self.folder, epoch),
            {"epoch": epoch, "metrics": metrics, "predictions": predicted},
        )
        logged = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(dict(logged))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, logged
        )
        return logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise DivergedError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower --lr "
                    f"(now {methods.rates(self.glue)})"
                )
            logs["step_ms"] = self.clock.milliseconds
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as e:  # torch.save raises the second
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written: {str(e) or type(e).__name__}. Make room on its disk and "
                "start again: the run goes on from the checkpoint before it"
            ) from e

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint holds what training changes; the frozen rest comes from the model again."""
        from safetensors.torch import save_file

        folder = Path(output_dir or self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = methods.trained_state(self.network)
        save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        from safetensors.torch import load_file

        state = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        methods.load_trained_state(self.network, state)


def epoch_file(folder: Path, epoch: int) -> Path:
    """Where the scores and dev predictions of one epoch are kept."""
    return folder / "epochs" / f"epoch-{epoch}.json"


def read_epochs(folder: Path, count: int) -> list[dict[str, Any]]:
    """The epochs' scores and predictions, first to last."""
    return [json.loads(epoch_file(folder, i).read_text("utf-8")) for i in range(1, count + 1)]
