"""The suite: which runs it makes, in which order, and what its report says of them."""

import argparse
import csv
import dataclasses
import json
import math
import os
import re
import signal
import sys
import threading
import time

import pytest
from glue_support import make_model, make_task

from fastspec.cli import main
from fastspec.cores import delta_shape
from fastspec.model.targets import find_targets, is_norm
from fastspec.studies.commands.glue import add_arguments
from fastspec.studies.glue import processes, report, table_rows
from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.finetune import run
from fastspec.studies.glue.methods import head_modules
from fastspec.studies.glue.presets import PRESETS
from fastspec.studies.glue.processes import Processes, SuiteError, make
from fastspec.studies.glue.record import flags, read_csv
from fastspec.studies.glue.suite import Job, Suite
from fastspec.studies.glue.table_rows import SUITES, TASK_SIZES, Row, choose, with_reference
from fastspec.studies.glue.tasks import TASKS

ROWS = (
    Row("a", {"rank": 4}, (1e-3, 1e-2, 1e-1), seeds=3),
    Row("a, reference path", {"rank": 4, "path": "reference"}, seeds=2, like="a"),
    Row("scratch", {"method": "full", "start": "random"}, (1e-4, 1e-3)),
    Row("b", {"rank": 4}, (1e-3, 1e-2), basis_of="scratch"),
)
# the score rises with the rate up to 1e-2 and falls with the seed; 1e-1 diverges
FAKE = """
import json, pathlib, sys
folder, config = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
folder.mkdir()
(folder.parent.parent / "order.txt").open("a").write(str(folder.relative_to(folder.parent.parent)) + "\\n")
digest, fingerprint = config["task"] + 16 * "0", config["start"] + 16 * "f"
(folder / "config.json").write_text(json.dumps(config))
(folder / "inputs.json").write_text(json.dumps({"rows": {"train": digest}, "model": fingerprint}))
if config["lr"] == 0.1:
    (folder / "diverged.json").write_text(json.dumps({"error": "the loss is nan at step 3"}))
    sys.exit(2)
score = 60 + 1000 * config["lr"] - config["seed"]
(folder / "written").write_text(json.dumps({
    "config": config, "losses": [0.7, 0.6],
    "best": {"score": score}, "last": {"score": score - 5},
    "parameters": {"adapter": 100, "head": 10, "total": 10000},
    "data": {"rows": {"trained on": 44, "dev": 2}, "sha256": {"train": digest}},
    "predictions": {"last": {"dev": [0, int("reference" in str(folder))]}}, "regression_tolerance": 0.0,
    "model": {"fingerprint": fingerprint}, "step_ms": 5.0,
}))
(folder / "written").rename(folder / "result.json")
"""


@pytest.fixture
def fake(monkeypatch):
    """Runs that take no time and know their score."""

    def command(config, folder, threads):
        return [sys.executable, "-c", FAKE, str(folder), json.dumps(config.to_dict())]

    monkeypatch.setattr(processes, "command", command)


def test_the_suite_makes_every_run_once_and_in_order(tmp_path, fake):
    s = Suite(tmp_path, ROWS, tasks=("rte",))
    said = []
    make(s, jobs=2, threads=1, announce=said.append)
    order = (tmp_path / "rte" / "order.txt").read_text().split()
    assert len(order) == len(set(order)) == len(said)
    assert set(order) == {
        *(f"a/lr{r}-seed0" for r in ("0.001", "0.01", "0.1")),
        "a/lr0.01-seed1",
        "a/lr0.01-seed2",
        "a-reference-path/lr0.01-seed0",
        "a-reference-path/lr0.01-seed1",
        "scratch/lr0.0001-seed0",
        "scratch/lr0.001-seed0",
        "b/lr0.001-seed0",
        "b/lr0.01-seed0",
    }
    assert order.index("scratch/lr0.001-seed0") < order.index("b/lr0.001-seed0")
    assert order.index("a/lr0.1-seed0") < order.index("a-reference-path/lr0.01-seed0")
    assert any("the loss is nan at step 3" in line for line in said)
    assert s.config(Job("rte", ROWS[3], 1e-3, 0)).basis_model == str(
        tmp_path / "rte" / "scratch" / "lr0.001-seed0"
    )
    make(s, jobs=2, threads=1, announce=said.append)
    assert len(said) == len(order)


def test_the_report_says_what_is_there_and_what_is_not(tmp_path, fake):
    s = Suite(tmp_path, ROWS, tasks=("rte", "cola"))
    with pytest.raises(ValueError, match="no run of this suite is finished"):
        report.write_report(s, tmp_path / "report")
    make(Suite(tmp_path, ROWS[:2], tasks=("rte",)), jobs=2, threads=1, announce=lambda _: None)
    make(Suite(tmp_path, ROWS[:1], tasks=("cola",), seeds=1), 2, 1, announce=lambda _: None)
    text = report.write_report(s, tmp_path / "report")
    row = next(line for line in text.splitlines() if line.startswith("| a |"))
    cells = [c.strip() for c in row.strip("|").split("|")]
    assert cells == [
        "a",
        "100 (1.000 %)",
        "110 (1.100 %)",
        "69.0 (68.0 to 70.0)",
        "70.0, 1 of 3 seeds",
        "69.5",
        "64.5",
        "0.01, 0.01",
    ]
    assert "scratch" not in text
    assert "| a | rte | 1 | 0.0e+00 | +0.00 | +0.00 | 1 of 2 |" in text
    assert "rte 44 rows, 3 epochs" in text
    lines = list(csv.DictReader((tmp_path / "report" / "runs.csv").open()))
    assert len(lines) == 5 + 2 + 3
    assert [(r["best"], r["chosen"]) for r in lines if r["rate"] == "0.1"] == [("", "0")] * 2
    chosen = {(r["task"], r["row"], r["rate"], r["seed"]) for r in lines if r["chosen"] == "1"}
    assert ("rte", "a", "0.01", "2") in chosen
    assert ("rte", "a", "0.001", "0") not in chosen
    assert (tmp_path / "report" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_search_is_marked(tmp_path, fake):
    s = Suite(tmp_path, ROWS[:1], tasks=("rte",))
    job = Job("rte", ROWS[0], 1e-3, 0)
    job.folder(tmp_path).parent.mkdir(parents=True)
    processes._make(s, job, 1, Processes())
    assert s.chosen_rate("rte", ROWS[0]) is None
    assert "0.001 (1 of 3 tried)" in report.markdown(s)


def test_rows_whose_donor_diverged_are_skipped_with_a_line(tmp_path, fake):
    rows = (
        Row("good", {"rank": 4}, (1e-2,)),
        Row("scratch", {"method": "full", "start": "random"}, (0.1,), seeds=3),
        Row("basis", {"rank": 4}, (1e-3, 1e-2), basis_of="scratch"),
        Row("labels", {"method": "full", "labels": "random"}, like="scratch"),
    )
    s = Suite(tmp_path, rows, tasks=("rte",))
    make(s, jobs=1, threads=1, announce=lambda _: None)
    order = (tmp_path / "rte" / "order.txt").read_text().split()
    assert order == ["good/lr0.01-seed0", "scratch/lr0.1-seed0"]
    lines = report.markdown(s).splitlines()
    assert "rte, scratch: every rate diverged." in lines
    assert "rte, basis: skipped, since every rate of 'scratch' diverged." in lines
    assert "rte, labels: skipped, since every rate of 'scratch' diverged." in lines
    assert s.skipped() == [line for line in lines if line.startswith("rte, ")]


def test_a_run_that_fails_ends_the_suite_with_its_output(tmp_path, monkeypatch):
    program = "import sys; sys.exit('no such thing')"
    monkeypatch.setattr(processes, "command", lambda *_: [sys.executable, "-c", program])
    with pytest.raises(SuiteError, match=r"lr0.0001-seed0 failed with status 1:\nno such thing"):
        make(Suite(tmp_path, ROWS[2:3], tasks=("rte",)), jobs=1, threads=1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_no_run_outlives_a_suite_that_is_terminated(tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    program = (
        "import os, pathlib, sys, time; new = pathlib.Path(sys.argv[1] + '.new'); "
        "new.write_text(str(os.getpid())); new.rename(sys.argv[1]); time.sleep(300)"
    )
    monkeypatch.setattr(processes, "command", lambda *_: [sys.executable, "-c", program, str(pid)])
    before = signal.getsignal(signal.SIGTERM)

    def terminate():
        while not pid.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(SystemExit) as ended:
        make(Suite(tmp_path / "runs", ROWS[2:3], tasks=("rte",)), jobs=1, threads=1)
    assert ended.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_would_start_as_the_suite_ends_does_not(tmp_path):
    begun = Processes()
    begun.end()
    program = f"open({str(tmp_path / 'ran')!r}, 'w')"
    assert begun.run([sys.executable, "-c", program]) == -signal.SIGTERM
    assert not (tmp_path / "ran").exists()


def test_processes_get_their_part_of_the_threads(tmp_path, monkeypatch):
    program = (
        "import os, pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); "
        "(p / 'threads').write_text(os.environ['OMP_NUM_THREADS'] + os.environ['TOKENIZERS_PARALLELISM'])"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(
        processes, "command", lambda _, folder, __: [sys.executable, "-c", program, str(folder)]
    )
    s = Suite(tmp_path, ROWS[2:3], tasks=("rte",))
    job = next(s.ready())
    assert processes._make(s, job, 3, Processes()) == 0
    assert (job.folder(tmp_path) / "threads").read_text() == "3false"
    monkeypatch.undo()
    words = processes.command(s.config(job), job.folder(tmp_path), 3)
    assert words[words.index("--threads") + 1] == "3"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "3"], "--epochs does not apply to --suite, whose rows decide it"),
        (["--lr", "0.1"], "--lr does not apply to --suite"),
        (["--preset", "band"], "--preset does not apply to --suite"),
        (["--train-bias"], "--train-bias does not apply to --suite"),
        (["--overwrite"], "--overwrite does not apply to --suite"),
        (["--jobs", "3", "--threads", "2"], "from 1 to the number of threads, 2, .* got 3"),
        (["--jobs", "-1"], "from 1 to the number of threads"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
    ],
)
def test_options_that_a_suite_would_ignore_are_refused(words, message, capsys):
    assert main(["glue", "--suite", "small", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_options_of_suites_are_refused_without_one(capsys):
    assert main(["glue", "--task", "rte", "--seeds", "2"]) == 2
    assert "--seeds applies to --suite only" in capsys.readouterr().err


def test_the_reference_path_goes_beside_every_spectral_row():
    rows = {row.name: row for row in with_reference(SUITES["full"])}
    assert len(rows) == len(with_reference(tuple(rows.values())))
    for name, row in rows.items():
        fast = row.fields.get("method", "spectral") == "spectral" and row.like is None
        assert fast == (f"{name}, reference path" in rows), name
    row = rows["dense 32, reference path"]
    assert (row.like, row.seeds) == ("dense 32", rows["dense 32"].seeds)
    assert row.fields == {**rows["dense 32"].fields, "path": "reference"}


def test_flags_give_the_configuration_back():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    every = [row for rows in SUITES.values() for row in rows if row.basis_of is None]
    for row in every:
        config = Suite("out", (*every,)).config(Job("sst2", row, 2e-3, 1))
        args = parser.parse_args(flags(config))
        fields = {name: getattr(args, name) for name in GlueConfig.__dataclass_fields__}
        assert GlueConfig(**fields) == config


def test_presets_are_overridden_by_what_follows_them():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--preset", "dense", "--rank", "16"])
    assert (args.core, args.rank) == ("dense", 16)
    assert parser.parse_args(["--rank", "16", "--preset", "dense"]).rank == PRESETS["dense"]["rank"]
    for fields in PRESETS.values():
        GlueConfig(task="rte", **fields)


def test_rows_bring_along_the_rows_they_need():
    names = [row.name for row in choose("full", ["band, reference path"])]
    assert names == ["band", "band, reference path"]
    with pytest.raises(ValueError, match="suite small has no row 'nothing'"):
        choose("small", ["nothing"])
    with pytest.raises(ValueError, match="needs the row 'a', which was left out"):
        Suite("out", ROWS[1:2])
    with pytest.raises(ValueError, match="either rates to search or a row to be like"):
        Row("odd", {})
    assert set(TASK_SIZES) <= set(TASKS)


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


@pytest.fixture(scope="module")
def counts():
    """(parameters trained beside the head, all) of every spectral control and search, on MiniLM's shapes."""
    from transformers import BertConfig, BertForSequenceClassification

    shapes = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    model = BertForSequenceClassification(shapes)
    plain = sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for m in model.modules() if is_norm(m) for p in m.parameters())
    found = {}
    for row in (*SUITES["controls"], *SUITES["search"]):
        config = GlueConfig("cola", train_pooler=True, **row.fields)
        if config.method != "spectral":
            continue
        spectral = config.spectral(head_modules(model, train_pooler=True))
        targets, _ = find_targets(model, spectral)
        cores = sum(
            math.prod(delta_shape(config.core, t.directions.rank, config.half_width))
            for t in targets
        )
        biases = config.train_bias * sum(t.module.bias.numel() for t in targets)
        adapter = cores + biases + config.train_layernorm * norms
        found[row.name] = adapter, plain + cores
    return found


def test_controls_have_equal_parameter_counts(counts):
    rows = [row.name for row in SUITES["controls"] if row.name in counts]
    assert len(rows) == 6
    assert {counts[row][0] for row in rows} == {36 * 32 * 32}


def test_searched_rows_keep_to_the_budget(counts):
    assert counts["band"] == (41472, 22755458)  # as counted in docs/results-glue.csv
    ours = [row.name for row in SUITES["search"] if "method" not in row.fields]
    assert len(ours) == len(SUITES["search"]) - 1  # the other is LoRA's
    for name in ours:
        adapter, total = counts[name]
        assert 0 < adapter / total <= 0.002, name
