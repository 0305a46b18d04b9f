"""The record of a suite's runs: what another machine knows from it, and what it refuses."""

import csv
import dataclasses
import sys
from pathlib import Path

import pytest
from glue_support import ROWS

from fastspec.cli import main
from fastspec.studies.glue import processes, report
from fastspec.studies.glue.processes import make
from fastspec.studies.glue.record import FIELDS, add_to_record, check_alike, read_csv, to_csv
from fastspec.studies.glue.suite import Job, Suite
from fastspec.studies.glue.table_rows import SUITES, Row, with_reference

RECORD = Path(__file__).parent.parent / "docs" / "results-glue.csv"


def quiet(line):
    pass


@pytest.fixture
def here(tmp_path, fake):
    """A suite that is finished, with its record."""
    s = Suite(tmp_path / "here", ROWS, tasks=("rte",), record=tmp_path / "record.csv")
    make(s, jobs=2, threads=1, announce=quiet)
    return s


def elsewhere(here, folder="elsewhere", **changes):
    """The same suite on a machine that has nothing but the record."""
    return dataclasses.replace(here, output=here.output.with_name(folder), **changes)


def test_another_machine_goes_on_from_the_record(here):
    there = elsewhere(here)
    make(there, jobs=2, threads=1, announce=quiet)
    assert not there.output.exists()
    assert report.markdown(there) == report.markdown(here)
    assert "| a | rte | 1 | 0.0e+00 | +0.00 | +0.00 | 1 of 2 |" in report.markdown(there)
    assert to_csv(there.all_runs()) == to_csv(here.all_runs())
    assert sorted(here.record.read_text().splitlines()) == sorted(
        to_csv(here.all_runs()).splitlines()
    )
    diverged = [run for run in there.all_runs() if run.diverged]
    assert [(run.row, run.rate, run.digest) for run in diverged] == [("a", 0.1, "rte" + 13 * "0")]


def test_an_unfinished_record_is_finished(here):
    lines = here.record.read_text().splitlines(keepends=True)
    gone = [line for line in lines if line.startswith(("rte,a,0.001,0", "rte,a,0.01,2"))]
    assert len(gone) == 2
    here.record.write_text("".join(line for line in lines if line not in gone))
    there = elsewhere(here)
    make(there, jobs=1, threads=1, announce=quiet)
    order = (there.output / "rte" / "order.txt").read_text().split()
    assert order == ["a/lr0.001-seed0", "a/lr0.01-seed2"]
    assert there.record.read_text() == "".join(lines)


@pytest.mark.parametrize(
    ("row", "made"),
    [
        # what a run needs of another is in that one's folder, so this is made again
        ("b", ["scratch/lr0.001-seed0", "b/lr0.001-seed0", "b/lr0.01-seed0"]),
        (
            "a, reference path",
            [f"{r}/lr0.01-seed{i}" for i in (0, 1) for r in ("a", "a-reference-path")],
        ),
    ],
)
def test_runs_whose_folders_others_need_are_made_again(here, row, made):
    lines = read_csv(here.record)
    here.record.write_text(to_csv([run for run in lines if run.row != row]))
    there = elsewhere(here)
    make(there, jobs=1, threads=1, announce=quiet)
    assert (there.output / "rte" / "order.txt").read_text().split() == made
    assert report.markdown(there) == report.markdown(here)


def test_a_run_made_again_that_fails_ends_the_suite(here, monkeypatch):
    here.record.write_text(to_csv([run for run in read_csv(here.record) if run.row != "b"]))
    monkeypatch.setattr(
        processes, "command", lambda *_: [sys.executable, "-c", "import sys; sys.exit('no')"]
    )
    with pytest.raises(
        processes.SuiteError, match=r"scratch.lr0.001-seed0 failed with status 1:\nno"
    ):
        make(elsewhere(here), jobs=1, threads=1, announce=quiet)


def test_a_line_of_another_command_does_not_count(here):
    there = elsewhere(here, overrides={"epochs": 7})
    assert {run.row for run in there.stale()} == {row.name for row in ROWS}
    assert there.all_runs() == []
    assert elsewhere(here).stale() == []
    # they stay, below their successors' lines too
    before = here.record.read_text()
    make(dataclasses.replace(there, rows=ROWS[2:3]), jobs=1, threads=1, announce=quiet)
    after = here.record.read_text()
    assert set(before.splitlines()) < set(after.splitlines())
    assert len(after.splitlines()) == len(before.splitlines()) + 2


def test_a_folder_of_another_command_does_not_count_either(here):
    changed = dataclasses.replace(here, overrides={"epochs": 7}, record=None)
    assert changed.all_runs() == []


def test_lines_of_other_suites_stay(here):
    other = elsewhere(here, "other", rows=(Row("c", {"rank": 2}, (1e-3,)),))
    before = read_csv(here.record)
    make(other, jobs=1, threads=1, announce=quiet)
    after = read_csv(here.record)
    assert [run for run in after if run.row != "c"] == before
    assert len(after) == len(before) + 1
    assert other.stale() == []


@pytest.mark.parametrize("name", ["digest", "fingerprint"])
def test_runs_of_other_rows_or_models_are_refused(here, name):
    lines = read_csv(here.record)
    at = next(i for i, run in enumerate(lines) if run.row == "a" and run.seed == 1)
    lines[at] = dataclasses.replace(lines[at], **{name: "something else"})
    here.record.write_text(to_csv(lines))
    mine = getattr(lines[0], name)
    with pytest.raises(ValueError, match=f"{mine} .*something else|something else .*{mine}"):
        report.markdown(elsewhere(here))


def test_untrained_bodies_may_differ_but_not_their_rows(here):
    scratch = next(run for run in read_csv(here.record) if run.row == "scratch")
    assert scratch.fingerprint != here.all_runs()[0].fingerprint
    check_alike(scratch, here.all_runs()[0])
    with pytest.raises(ValueError, match="training rows differ by digest"):
        check_alike(scratch, dataclasses.replace(scratch, digest="other"))


def test_chosen_is_computed_and_not_read(here):
    lines = list(csv.DictReader(here.record.open()))
    chosen = [(r["row"], r["rate"], r["seed"]) for r in lines if r["chosen"] == "1"]
    assert chosen == [
        *(("a", "0.01", str(seed)) for seed in range(3)),
        *(("a, reference path", "0.01", str(seed)) for seed in range(2)),
        ("b", "0.01", "0"),
        ("scratch", "0.001", "0"),
    ]
    runs = [
        dataclasses.replace(run, best=99.0) if run.rate == 1e-3 else run
        for run in read_csv(here.record)
    ]
    here.record.write_text(to_csv(runs))
    found = [
        r["rate"]
        for r in csv.DictReader(here.record.open())
        if (r["row"], r["chosen"]) == ("a", "1")
    ]
    assert found == ["0.001"]
    assert elsewhere(here).chosen_rate("rte", ROWS[0]) == 0.001


def test_a_damaged_record_is_refused_by_line(here):
    text = here.record.read_text()
    here.record.write_text(text.replace(",69.0,", ",many,", 1))
    with pytest.raises(
        ValueError, match=r"record.csv:\d+: column 'best' holds 'many', expected float"
    ):
        elsewhere(here).all_runs()
    here.record.write_text(text.replace("digest", "sum", 1))
    with pytest.raises(ValueError, match="it has no column 'digest'"):
        elsewhere(here).all_runs()
    assert here.record.read_text().startswith("task,row")


def test_a_basis_is_named_alike_on_every_machine(here):
    b = Job("rte", ROWS[3], 1e-3, 0)
    assert "--basis-model runs/suite/rte/scratch/lr0.001-seed0" in here.find(b).command


def test_the_committed_record_counts_today(tmp_path):
    record = read_csv(RECORD)
    # the base suite has a record of its own
    named = {r.name: r for name, rows in SUITES.items() if name != "base" for r in rows}
    rows = with_reference(tuple(named.values()))
    s = Suite(tmp_path, rows, record=RECORD)
    assert s.stale() == []
    assert {run.row for run in record} <= {row.name for row in rows}
    assert len(s.all_runs()) == len(record)
    assert RECORD.read_text() == to_csv(record)
    assert [f.name for f in FIELDS][:4] == ["task", "row", "rate", "seed"]


def test_the_command_reads_and_writes_the_record(here, capsys, monkeypatch):
    monkeypatch.setitem(SUITES, "small", ROWS)
    add_to_record(
        here.record, [dataclasses.replace(read_csv(here.record)[0], command="fastspec glue")]
    )
    words = ["glue", "--suite", "small", "--tasks", "rte", "--record", str(here.record)]
    words += ["--output", str(here.output.with_name("there")), "--jobs", "2", "--threads", "2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "another command for their run: 1 (the first: rte a, rate 0.001, seed 0)" in out
    assert report.markdown(here) in out
