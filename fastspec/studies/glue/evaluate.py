"""Scoring a model on a task's dev rows outside a training run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastspec.studies.glue.data import Source, Split
from fastspec.studies.glue.tasks import predictions, score_task


class Scorer:
    """Scores models on the dev rows of one task; they are tokenised once.

    Args:
        source: the task's rows.
        tokenizer: of the models to score.
        max_length: longest row, in tokens.
        rows: only the first so many of each dev split; None for all.
        batch_size: rows of similar length that are run together.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        *,
        max_length: int = 128,
        rows: int | None = None,
        batch_size: int = 64,
    ) -> None:
        self.task = source.task
        splits = {name: split.head(rows) for name, split in source.dev.items()}
        self.labels = {name: split.labels or [] for name, split in splits.items()}
        self._batches = {
            name: batches(tokenizer, split.texts, max_length, batch_size)
            for name, split in splits.items()
        }

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The task's metrics in points, "score" among them; the model is left in eval mode."""
        model.eval()
        device = next(model.parameters()).device
        predicted = {}
        for name, split in self._batches.items():
            logits = torch.empty(len(self.labels[name]), self.task.num_labels)
            for rows, batch in split:
                inputs = {k: v.to(device) for k, v in batch.items()}
                logits[rows] = model(**inputs).logits.float().cpu()
            predicted[name] = predictions(self.task, logits.numpy())
        return score_task(self.task, predicted, self.labels)


def batches(
    tokenizer: Any, texts: list[tuple[str, ...]], max_length: int, batch_size: int
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """(row numbers, padded inputs) in order of length."""
    columns = tokenizer(
        *map(list, zip(*texts, strict=True)), truncation=True, max_length=max_length
    )
    order = torch.tensor([len(ids) for ids in columns["input_ids"]]).argsort(stable=True)
    return [
        (
            rows,
            tokenizer.pad(
                {key: [values[i] for i in rows] for key, values in columns.items()},
                return_tensors="pt",
            ),
        )
        for rows in order.split(batch_size)
    ]


def labelled_batches(
    tokenizer: Any, split: Split, max_length: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """`batches` with their labels: keyword arguments of a model that returns a loss."""
    labels = torch.tensor(split.labels)
    return [
        {**batch, "labels": labels[rows]}
        for rows, batch in batches(tokenizer, split.texts, max_length, batch_size)
    ]
