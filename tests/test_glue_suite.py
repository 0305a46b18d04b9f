"""The suite: which runs it makes, in which order, and what its report says of them."""

import csv
import os
import signal
import sys
import threading
import time

import pytest
from glue_support import ROWS

from fastspec.studies.glue import processes, report
from fastspec.studies.glue.processes import Processes, SuiteError, make
from fastspec.studies.glue.suite import Job, Suite
from fastspec.studies.glue.table_rows import Row


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
