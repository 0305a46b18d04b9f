"""The metrics against values worked out by hand, and how they make a score."""

import math

import numpy as np
import pytest

from fastspec.studies.glue.tasks import METRICS, TASKS, predictions, score_split, score_task

# 10 rows: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
LABELS = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
PREDICTED = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])


def test_classification_metrics_by_hand():
    assert METRICS["accuracy"](PREDICTED, LABELS) == pytest.approx(7 / 10)
    assert METRICS["f1"](PREDICTED, LABELS) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    matthews = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert METRICS["matthews"](PREDICTED, LABELS) == pytest.approx(matthews)


def test_correlations_by_hand():
    predicted, labels = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 3.0, 2.0, 4.0])
    # deviations (-3, -2, -1, 6) and (-1.5, 0.5, -0.5, 1.5)
    pearson = (4.5 - 1.0 + 0.5 + 9.0) / math.sqrt(50 * 5)
    assert METRICS["pearson"](predicted, labels) == pytest.approx(pearson)
    # one pair of neighbouring ranks exchanged: 1 - 6 * 2 / (4 * 15)
    assert METRICS["spearman"](predicted, labels) == pytest.approx(0.8)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman", "f1"])
def test_a_constant_prediction_earns_nothing(name):
    assert METRICS[name](np.zeros(10), LABELS) == 0.0


@pytest.mark.parametrize("name", [n for n in TASKS if n != "ax"])
def test_official_metrics(name):
    official = {
        "cola": {"matthews"},
        "stsb": {"pearson", "spearman"},
        "mrpc": {"f1", "accuracy"},
        "qqp": {"f1", "accuracy"},
    }
    assert set(TASKS[name].metrics) == official.get(name, {"accuracy"})


def test_scores_are_means_in_points():
    scores = score_split(TASKS["mrpc"], PREDICTED, LABELS)
    assert scores["accuracy"] == pytest.approx(70.0)
    assert scores["score"] == pytest.approx((70.0 + 100 * 2 / 3) / 2)
    mnli = score_task(
        TASKS["mnli"],
        {"matched": [0, 1, 2, 2], "mismatched": [0, 0]},
        {"matched": [0, 1, 2, 1], "mismatched": [0, 1]},
    )
    assert mnli == {"matched_accuracy": 75.0, "mismatched_accuracy": 50.0, "score": 62.5}


def test_predictions_from_logits():
    logits = np.array([[0.1, 2.0, -1.0], [3.0, 2.0, 1.0]])
    assert predictions(TASKS["mnli"], logits) == [1, 0]
    assert predictions(TASKS["stsb"], np.array([[2.5], [7.0]])) == [2.5, 7.0]


def test_odd_lengths_are_refused():
    with pytest.raises(ValueError, match="3 predictions for 2 labels"):
        score_split(TASKS["rte"], [0, 1, 1], [0, 1])
    with pytest.raises(ValueError, match="empty"):
        score_split(TASKS["rte"], [], [])
