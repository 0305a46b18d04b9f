"""Sources of rows: every task from files and from the hub's form, errors by line, the embedded task."""

import os
from pathlib import Path

import pytest
from glue_support import make_task, write_tsv

from fastspec.studies.glue import data
from fastspec.studies.glue.sentences import swap_rows
from fastspec.studies.glue.tasks import EMBEDDED, TASKS

FILES = [task for task in TASKS.values() if task is not EMBEDDED]
REAL = os.environ.get("FASTSPEC_GLUE_DIR")
# rows of the official files; QNLI's train split is a subset there
REAL_ROWS = {
    "cola": (8551, 1043),
    "sst2": (67349, 872),
    "rte": (2490, 277),
    "wnli": (635, 71),
    "qnli": (9999, 5463),
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("FASTSPEC_GLUE_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("task", FILES, ids=lambda t: t.name)
def test_every_task_from_a_folder(task, tmp_path):
    source = data.load(task, make_task(tmp_path, task, train=12, dev=6))
    trained = TASKS[task.trains_on or task.name]
    assert source.kind == "folder"
    assert len(source.train) == 12
    assert list(source.dev) == list(trained.dev)
    assert {len(split) for split in source.dev.values()} == {6}
    assert all(len(texts) == len(task.text) for texts in source.train.texts)
    for split in (source.train, *source.dev.values()):
        if task.labels is None:
            assert all(isinstance(v, float) and 0 <= v <= 5 for v in split.labels)
        else:
            assert set(split.labels) <= set(range(len(task.labels)))
    assert {name: split.labels for name, split in source.test.items()} == dict.fromkeys(task.test)


@pytest.mark.parametrize("task", FILES, ids=lambda t: t.name)
def test_hub_rows_are_the_folders_rows(task, tmp_path, monkeypatch):
    import datasets

    make_task(tmp_path, task, train=12, dev=6)
    folder = data.from_folder(task, tmp_path)
    asked = []

    def rows(split):
        labels = split.labels or [-1] * len(split)
        return [
            dict(zip(task.text, texts, strict=True)) | {"label": label, "idx": i}
            for i, (texts, label) in enumerate(zip(split.texts, labels, strict=True))
        ]

    def load_dataset(name, configuration):
        asked.append((name, configuration))
        if task.test and configuration == task.hub:
            return {"test": datasets.Dataset.from_list(rows(folder.test["test"]))}
        trained = TASKS[task.trains_on or task.name]
        splits = {trained.dev[name][1]: split for name, split in folder.dev.items()}
        splits["train"] = folder.train
        return {name: datasets.Dataset.from_list(rows(split)) for name, split in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = data.load(task)
    assert hub.kind == "hub"
    assert {name for name, _ in asked} == {"nyu-mll/glue"}
    assert asked[0][1] == (task.trains_on or task.hub)
    assert (hub.train.texts, hub.train.labels) == (folder.train.texts, folder.train.labels)
    for name, split in folder.dev.items():
        assert (hub.dev[name].texts, hub.dev[name].labels) == (split.texts, split.labels)
    assert {n: s.texts for n, s in hub.test.items()} == {n: s.texts for n, s in folder.test.items()}


def test_a_hub_row_without_text_is_named():
    rows = {"train": [{"sentence": "a b", "label": 1}, {"sentence": None, "label": 0}]}
    with pytest.raises(data.DataError, match=r"glue/cola/train:2: no text in column 'sentence'"):
        data.from_splits(TASKS["cola"], rows, {})


@pytest.mark.skipif(not REAL, reason="FASTSPEC_GLUE_DIR names no folder of real GLUE files")
@pytest.mark.parametrize("name", REAL_ROWS)
def test_the_real_files(name):
    source = data.from_folder(TASKS[name], Path(REAL))
    assert (len(source.train), len(source.dev["dev"])) == REAL_ROWS[name]
    assert set(source.train.labels) == {0, 1}
    # quotes are text: rows would be joined or lose them if they were taken for quoting
    raw = (Path(REAL) / TASKS[name].folder / "train.tsv").read_text("utf-8").split("\n")
    quoted = sum('"' in line for line in raw)
    assert sum(any('"' in text for text in texts) for texts in source.train.texts) == quoted


MALFORMED = {
    "too few cells": (["a cat runs"], "3: expected 2 cells (sentence, label), got 1"),
    "too many cells": (["a cat\truns\t1"], "3: expected 2 cells (sentence, label), got 3"),
    "blank line": ([""], "3: expected 2 cells (sentence, label), got 1"),
    "unknown number": (["a cat\t2"], "3: unknown label '2', expected 0 (unacceptable), 1 (accep"),
    "negative": (["a cat\t-1"], "3: unknown label '-1'"),
    "fraction": (["a cat\t0.5"], "3: unknown label '0.5'"),
    "odd digit": (["a cat\t²"], "3: unknown label '²'"),
    "unknown name": (["a cat\tgood"], "3: unknown label 'good'"),
    "no label": (["a cat\t"], "3: unknown label ''"),
}


@pytest.mark.parametrize(("lines", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_names_file_line_and_reason(lines, message, tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("\n".join(["sentence\tlabel", "the dog\t1", *lines, "the man\t0"]), "utf-8")
    with pytest.raises(data.DataError) as error:
        data.read_tsv(path, TASKS["cola"])
    assert str(error.value).startswith(f"{path}:{message}")


@pytest.mark.parametrize("value", ["x", "5.1", "-0.1", "nan"])
def test_a_regression_label_out_of_range(value, tmp_path):
    rows = [("a", "b", 1.5), ("a", "b", value)]
    path = write_tsv(tmp_path / "train.tsv", ("sentence1", "sentence2", "label"), rows)
    with pytest.raises(data.DataError, match=r"train\.tsv:3: label"):
        data.read_tsv(path, TASKS["stsb"])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "1: the file is empty"),
        (b"sentence\tlabel\n", "1: no rows"),
        (b"sentence\tvalue\na\t1\n", "1: no column 'label'"),
        (b"text\tlabel\na\t1\n", "1: expected the columns sentence and label, got text, label"),
        (b"sentence\tlabel\nok\t1\n\xff\xfe\t0\n", "3: not UTF-8 at byte 0"),
    ],
)
def test_a_malformed_file(raw, message, tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_bytes(raw)
    with pytest.raises(data.DataError) as error:
        data.read_tsv(path, TASKS["cola"])
    assert f"{path}:{message}" in str(error.value)


def test_text_is_taken_as_it_stands(tmp_path):
    # quotes, a Unicode line separator and blanks are text; CRLF, BOM and a missing last newline are not
    path = tmp_path / "dev.tsv"
    texts = ['"an open quote', "it 's \u2028 here . ", "\u00e9t\u00e9", ""]
    lines = ["sentence\tlabel", *(f"{t}\tacceptable" for t in texts)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    split = data.read_tsv(path, TASKS["cola"])
    assert [t for (t,) in split.texts] == texts
    assert split.labels == [1, 1, 1, 1]


def test_missing_folders_and_files(tmp_path, monkeypatch):
    rte, mnli = TASKS["rte"], TASKS["mnli"]
    make_task(tmp_path, rte)
    make_task(tmp_path, mnli)
    with pytest.raises(FileNotFoundError, match="--data: no such folder"):
        data.load(rte, tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no folder 'CoLA' \(it has MNLI, RTE\)"):
        data.load(TASKS["cola"], tmp_path)
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev_mismatched\.tsv: no such file"):
        data.load(mnli, tmp_path)
    monkeypatch.setenv("FASTSPEC_GLUE_DIR", str(tmp_path))
    assert data.load(rte).where == str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"FASTSPEC_GLUE_DIR: .* has no folder 'CoLA'"):
        data.load(TASKS["cola"])


def test_without_folder_and_hub_the_embedded_task_stands_in(monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(data, "hub_reachable", lambda: False)
    source = data.load(TASKS["mrpc"])
    assert source.kind == "embedded"
    assert source.task is EMBEDDED
    assert "the hub can't be reached" in capsys.readouterr().out


def test_an_unreachable_hub_is_given_up_quickly(monkeypatch):
    import time

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(data, "_reachable", None)
    # TEST-NET-1 (RFC 5737): no host answers there
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")
    began = time.perf_counter()
    assert data.hub_reachable(seconds=0.5) is False
    assert time.perf_counter() - began < 5


def test_the_embedded_task_is_real_balanced_and_repeatable():
    source = data.embedded()
    again = data.embedded()
    assert source.to_dict() == again.to_dict()
    train, dev = source.train, source.dev["dev"]
    assert abs(sum(train.labels) / len(train) - 0.5) < 0.05
    assert len(train) >= 4 * len(dev) >= 400
    # no sentence in both splits, in whichever form
    words = [{" ".join(sorted(t.split())) for (t,) in split.texts} for split in (train, dev)]
    assert not words[0] & words[1]


def test_a_swapped_row_is_one_exchange_of_neighbours():
    texts = [f"One two three four five six seven number{'x' * i} end." for i in range(20)]
    rows = swap_rows(texts)
    by_last = {t.split()[-2]: t.split() for t in texts}
    intact = swapped = 0
    for text, label in rows:
        words = text.split()
        # the number is unique and may itself have been moved by one place
        original = next(v for k, v in by_last.items() if k in words)
        differing = [i for i, (a, b) in enumerate(zip(words, original, strict=True)) if a != b]
        if label == 1:
            intact += 1
            assert not differing
        else:
            swapped += 1
            i, j = differing
            assert j == i + 1
            assert (words[i], words[j]) == (original[j], original[i])
            assert i > 0
            assert j < len(words) - 1
    assert (intact, swapped) == (10, 10)
