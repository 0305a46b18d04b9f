"""The demo on a tiny model, and the step times it prints."""

import os
import subprocess
import sys

import pytest
import torch
from glue_support import make_model, make_task

from fastspec.cli import main
from fastspec.studies.commands.demo import commonest, running_mean
from fastspec.studies.encoders import load_classifier
from fastspec.studies.glue import methods
from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.data import load
from fastspec.studies.glue.tasks import TASKS
from fastspec.studies.glue.timing import FLOOR, freeze_to_floor, step_times

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_model(folder / "model")
    for task in ("sst2", "rte"):
        make_task(folder / "glue", TASKS[task], train=40, dev=12)
    return folder


LABELS = ("the head alone", "spectral, fast path", "spectral, reference path", "LoRA r8")


def test_the_demo_prints_a_table_and_draws(place, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("FASTSPEC_GLUE_DIR", raising=False)
    arguments = ["demo", "--model", str(place / "model"), "--data", str(place / "glue")]
    assert main([*arguments, "--epochs", "1", "--output", str(place / "out")]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no bars where nobody watches
    assert [line for line in out.splitlines() if line.startswith("sst2 ")] != []
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    for label in LABELS:
        assert rows[label][-1] == "kB"
        assert float(rows[label][-3]) > 0
    assert rows["spectral, fast path"][3:5] == rows["spectral, reference path"][3:5]
    assert "dev predictions of the last epoch that differ: 0 of 12" in out
    assert rows["the commonest answer"][3:] == ["58.3", "58.3"]  # 7 of 12
    picture = place / "out" / "learning.png"
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")

    # interrupted before its picture, the demo takes up the runs that are done; finished, it repeats
    results = sorted((place / "out").glob("*/result.json"))
    assert len(results) == len(LABELS)
    stamps = [path.stat().st_mtime_ns for path in results]
    picture.unlink()
    assert main([*arguments, "--epochs", "1", "--output", str(place / "out")]) == 0
    assert [path.stat().st_mtime_ns for path in results] == stamps
    assert main([*arguments, "--epochs", "1", "--output", str(place / "out")]) == 0
    assert all(path.stat().st_mtime_ns > t for path, t in zip(results, stamps, strict=True))


def test_the_demo_takes_the_embedded_task_without_a_folder(place, monkeypatch):
    import argparse

    from fastspec.studies.commands.demo import add_arguments, configurations

    monkeypatch.delenv("FASTSPEC_GLUE_DIR", raising=False)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert {c.task for c in configurations(parser.parse_args([])).values()} == {"swap"}
    monkeypatch.setenv("FASTSPEC_GLUE_DIR", str(place / "glue"))
    configs = configurations(parser.parse_args([]))
    assert {c.task for c in configs.values()} == {"sst2"}
    assert list(configs) == list(LABELS)
    assert {c.path for c in configs.values() if c.method == "spectral"} == {"fast", "reference"}
    assert len({(c.seed, c.max_train_rows, c.epochs, c.batch_size) for c in configs.values()}) == 1


def test_the_demo_shows_only_its_own_lines(place):
    """Imports that a process makes but once, and their notices, are part of what is seen."""
    words = [
        "demo",
        "--model",
        str(place / "model"),
        "--data",
        str(place / "glue"),
        "--epochs",
        "1",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "fastspec", *words, "--output", str(place / "alone")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\r" not in ran.stdout
    for line in ran.stdout.splitlines():
        assert "Failed to load" not in line
        assert "Warning" not in line
    assert ran.stdout.splitlines()[0].startswith("data: sst2 from")


def test_the_commonest_answer_is_scored_by_the_tasks_own_metric(place):
    make_task(place / "glue", TASKS["cola"], train=8, dev=12)
    data = str(place / "glue")
    assert commonest(GlueConfig("cola", data=data)) == 0.0  # Matthews
    labels = load(TASKS["rte"], data).dev["dev"].labels
    share = max(labels.count(0), labels.count(1)) / len(labels)
    assert commonest(GlueConfig("rte", data=data)) == pytest.approx(100 * share)


def test_step_times_cover_every_method_and_the_floor(place):
    common = {"task": "rte", "data": str(place / "glue"), "model": str(place / "model"), "rank": 4}
    configs = {"ours": GlueConfig(**common), "all": GlueConfig(method="full", **common)}
    times = step_times(configs, rounds=3, warmup=1)
    assert list(times) == [FLOOR, "ours", "all"]
    assert times[FLOOR].ratio == 1.0
    assert all(t.milliseconds > 0 and t.ratio > 0 for t in times.values())


def test_the_floor_sends_gradients_through_every_layer(place):
    model = load_classifier(str(place / "model"), TASKS["rte"])
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
    heads = methods.head_modules(model)
    floor = freeze_to_floor(model)
    output = floor(ids, labels=torch.tensor([1]))
    assert torch.equal(output.logits, expected)
    output.loss.backward()
    trained = {n: p for n, p in floor.named_parameters() if p.requires_grad}
    assert {n for n in trained if not n.startswith(tuple(heads))} == {"input_shift.shift"}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())


def test_running_mean():
    assert running_mean([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]
