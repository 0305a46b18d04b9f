"""The task table: columns, labels, splits and official metrics of every task.

Source: GLUE (Wang et al. 2018, arXiv 1804.07461), table 1 and section 3.5; label order as in the
Hugging Face data set `nyu-mll/glue`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

MATCHED, MISMATCHED = "matched", "mismatched"
NLI = ("entailment", "neutral", "contradiction")


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: as on the command line.
        folder: the task's folder in a GLUE directory; its capitals and hyphens don't matter there.
        hub: the configuration's name in `nyu-mll/glue`.
        text: names of the one or two text columns on the hub; `sentence` or `sentence1`,
            `sentence2` are accepted in files as well.
        labels: class names in the order of their numbers, or `None` for regression.
        metrics: names in `METRICS`; a split's score is their mean, the task's the mean over splits.
        dev: dev splits, each with the names that its file (without `.tsv`) or hub split may have.
        test: a split without labels to predict after training, in the same form.
        value_range: bounds of a regression label.
        trains_on: the task whose train and dev splits are used (AX has none of its own).
    """

    name: str
    folder: str
    hub: str
    text: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    dev: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: {"dev": ("dev", "validation")}
    )
    test: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    value_range: tuple[float, float] = (0.0, 5.0)
    trains_on: str | None = None

    @property
    def regression(self) -> bool:
        return self.labels is None

    @property
    def num_labels(self) -> int:
        return 1 if self.labels is None else len(self.labels)

    def text_columns(self) -> list[tuple[str, ...]]:
        """The sets of text columns a source may have, the hub's own first."""
        plain = ("sentence",) if len(self.text) == 1 else ("sentence1", "sentence2")
        return [self.text] if self.text == plain else [self.text, plain]


_MNLI_DEV = {
    MATCHED: ("dev_matched", "validation_matched"),
    MISMATCHED: ("dev_mismatched", "validation_mismatched"),
}
_BINARY_NLI = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")

EMBEDDED = Task("swap", "swap", "", ("sentence",), ("swapped", "intact"))

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", "CoLA", "cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        Task("sst2", "SST-2", "sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", "MRPC", "mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        Task("stsb", "STS-B", "stsb", _PAIR, None, ("pearson", "spearman")),
        Task(
            "qqp",
            "QQP",
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
        ),
        Task("mnli", "MNLI", "mnli", ("premise", "hypothesis"), NLI, dev=_MNLI_DEV),
        Task("qnli", "QNLI", "qnli", ("question", "sentence"), _BINARY_NLI),
        Task("rte", "RTE", "rte", _PAIR, _BINARY_NLI),
        Task("wnli", "WNLI", "wnli", _PAIR, ("not_entailment", "entailment")),
        Task(
            "ax",
            "AX",
            "ax",
            ("premise", "hypothesis"),
            NLI,
            dev={},
            test={"test": ("test",)},
            trains_on="mnli",
        ),
        EMBEDDED,
    )
}


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).mean())


def _f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0.0))


def _matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def _pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, labels)


def _spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, labels)


def _correlation(function, predicted: np.ndarray, labels: np.ndarray) -> float:
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return 0.0  # undefined for a constant; a model that always says the same has earned nothing
    return float(function(predicted, labels)[0])


METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def predictions(task: Task, logits: np.ndarray) -> list[int] | list[float]:
    """Class numbers (or regression values) from logits [rows, num_labels]."""
    if task.regression:
        return [float(v) for v in logits.reshape(-1)]
    return [int(v) for v in logits.argmax(-1)]


def score_split(
    task: Task, predicted: Sequence[float], labels: Sequence[float]
) -> dict[str, float]:
    """The task's metrics on one split and their mean as "score", all in points (times 100)."""
    if len(predicted) != len(labels):
        raise ValueError(f"{task.name}: {len(predicted)} predictions for {len(labels)} labels")
    if not len(labels):
        raise ValueError(f"{task.name}: nothing to score, the split is empty")
    p, y = np.asarray(predicted), np.asarray(labels)
    scores = {name: 100 * METRICS[name](p, y) for name in task.metrics}
    return {**scores, "score": sum(scores.values()) / len(scores)}


def score_task(
    task: Task,
    predicted: Mapping[str, Sequence[float]],
    labels: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """Metrics of every dev split as "split_metric" (just "metric" if there is one split) and "score".

    Units: points. "score" is the mean over splits of the mean over metrics, as on the leaderboard.
    """
    splits = {name: score_split(task, predicted[name], labels[name]) for name in labels}
    if len(splits) == 1:
        return next(iter(splits.values()))
    out = {f"{name}_{m}": v for name, s in splits.items() for m, v in s.items() if m != "score"}
    out["score"] = sum(s["score"] for s in splits.values()) / len(splits)
    return out
