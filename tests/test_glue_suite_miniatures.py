"""Every suite of `fastspec glue`, on a tiny model and task."""

import dataclasses

import pytest
from glue_support import make_model, make_task

from fastspec.cli import main
from fastspec.studies.glue import processes, table_rows
from fastspec.studies.glue.finetune import run
from fastspec.studies.glue.record import read_csv
from fastspec.studies.glue.table_rows import SUITES, choose
from fastspec.studies.glue.tasks import TASKS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and task."""
    folder = tmp_path_factory.mktemp("suites")
    make_model(folder / "model", layers=3)
    make_task(folder / "glue", TASKS["rte"], train=16, dev=8)
    return folder


def small(row):
    """The row on the tiny model: ranks that it has, one rate and seed, one epoch of four steps."""
    fields = {**row.fields, "epochs": 1, "batch_size": 4, "max_length": 16}
    if isinstance(fields.get("rank"), int):
        fields["rank"] = 4
    # four steps of full finetuning at its own rate move no vector by a thousandth
    rates = (1e-2,) if row.rates and fields.get("method") == "full" else row.rates[1:2]
    return dataclasses.replace(row, fields=fields, rates=rates, seeds=1)


# the whole of each suite takes minutes; these are its forms: like, basis_of, ranges, and one plain row
MINIATURES = {
    "small": ["band", "head"],
    "base": ["band 4, values and outputs"],
    "full": ["band, reference path", "pissa-r8"],
    "controls": [
        "full, random labels",
        "dense 32, untrained model's basis",
        "dense 32, from-scratch model's basis",
        "dense 32, trailing",
    ],
    "search": ["band 2, attention", "dense 61, MLP"],
    "ranges": None,
    "layers": None,
}


def here(suite, job, *_):
    """A run in this process: importing everything again takes longer than the run."""
    folder = job.folder(suite.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    run(suite.config(job), folder)
    return 0


@pytest.mark.parametrize("name", SUITES)
def test_a_miniature_of_every_suite(place, name, capsys, monkeypatch):
    if name != "small":
        monkeypatch.setattr(processes, "_make", here)
    for parts in ("ranges", "layers"):
        make_rows = getattr(table_rows, parts)
        monkeypatch.setattr(table_rows, parts, lambda n, f=make_rows: tuple(map(small, f(n))))
    monkeypatch.setitem(SUITES, name, tuple(map(small, SUITES[name])))
    out = place / "out"
    base = ["glue", "--suite", name, "--tasks", "rte", "--model", str(place / "model")]
    base += ["--data", str(place / "glue"), "--output", str(out), "--threads", "2"]
    base += ["--jobs", "2" if name == "small" else "1"]
    if MINIATURES[name]:
        base += ["--rows", *MINIATURES[name]]
    timed = ["--time"] if name == "ranges" else []
    status = main([*base, "--record", str(place / "record.csv"), *timed])
    assert status == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    table = (out / f"report-{name}" / "table.md").read_text()
    assert table in printed + "\n"
    first = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    wanted = [row.name for row in choose(name, MINIATURES[name], str(place / "model"))]
    assert first[2 : 2 + len(wanted)] == wanted
    assert "best dev epoch" in printed
    assert {run.row for run in read_csv(place / "record.csv")} >= set(wanted)
    assert main([*base, "--record", str(place / "record.csv"), "--report"]) == 0
    assert "best dev epoch" in capsys.readouterr().out
    checks = {"full": parity, "controls": stability, "ranges": quarters, "layers": thirds}
    checks.get(name, lambda *_: None)(place, table)


def parity(place, table):
    line = next(line for line in table.splitlines() if line.startswith("| band | rte | 0 |"))
    assert float(line.split("|")[4]) < 1e-3


def stability(place, table):
    header, _, *lines = (
        [c.strip() for c in line.strip("|").split("|")]
        for line in table.splitlines()
        if "|" in line
    )
    assert header[-1] == "stability"
    stable = {line[0]: line[-1] for line in lines}
    assert set(stable) == {row.name for row in choose("controls", MINIATURES["controls"])}
    for row, text in stable.items():
        if not row.startswith("full"):
            assert text == "-", row
            continue
        assert all(0.5 < float(value) <= 1 for value in text.split(" / ")), row
    assert len({stable[r] for r in ("full", "full, random labels", "full, from scratch")}) == 3
    record = {run.row: run for run in read_csv(place / "record.csv")}
    assert "--labels random" in record["full, random labels"].command
    assert record["full, from scratch"].fingerprint != record["full"].fingerprint


def quarters(place, table):
    lines = table.splitlines()[2:6]
    assert [line.split("|")[2].split()[0] for line in lines] == [str(8 * 6 * 3)] * 4
    for line in lines:
        step, saved = (float(c) for c in line.strip("| ").split("|")[-2:])
        assert step > 0
        assert 0.5 < saved < 2.5
    assert "directions 24 to 32" in table


def thirds(place, table):
    lines = table.splitlines()[2:5]
    assert [line.split("|")[2].split()[0] for line in lines] == [str(32 * 6)] * 3


def test_ranges_need_a_model_that_says_its_size(place, monkeypatch, capsys):
    monkeypatch.setattr(table_rows, "model_size", lambda name, field: None)
    assert main(["glue", "--suite", "ranges", "--model", str(place / "model")]) == 2
    assert "needs a model whose configuration has hidden_size" in capsys.readouterr().err
