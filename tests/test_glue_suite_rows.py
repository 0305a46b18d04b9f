"""The rows of the suites and the options of `fastspec glue --suite`."""

import argparse
import math
import re

import pytest
from glue_support import ROWS, trained_by_map

from fastspec.cli import main
from fastspec.cores import delta_shape
from fastspec.model.targets import find_targets, is_norm
from fastspec.studies.commands.glue import add_arguments
from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.methods import head_modules
from fastspec.studies.glue.presets import PRESETS
from fastspec.studies.glue.record import flags
from fastspec.studies.glue.suite import Job, Suite
from fastspec.studies.glue.table_rows import SUITES, TASK_SIZES, Row, choose, with_reference
from fastspec.studies.glue.tasks import TASKS


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


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--preset", "values", "--core", "dense"], None),
        (["--core", "dense", "--preset", "values"], None),
        (["--preset", "values", "--core", "dense", "--half-width", "2"], "half_width=2 is of"),
        (["--core", "band", "--core-rank", "3"], "core_rank=3 is of core='low_rank'"),
    ],
)
def test_a_size_that_the_core_has_not(tmp_path, monkeypatch, capsys, flags, error):
    made = []
    monkeypatch.setattr(
        "fastspec.studies.glue.finetune.run", lambda config, *_, **__: made.append(config)
    )
    monkeypatch.setattr("fastspec.studies.commands.glue.summary", str)
    status = main(["glue", "--task", "swap", "--output", str(tmp_path), *flags])
    if error:
        assert status
        assert error in capsys.readouterr().err
        return
    dense = flags[0] == "--preset"
    assert (made[0].core, made[0].half_width) == (("dense", 1) if dense else ("band", 4))


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


def trained_in_core(config, k):
    if config.core_map is not None:
        return trained_by_map(k)[config.core_map]
    return math.prod(delta_shape(config.core, k, config.half_width, config.core_rank))


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
        cores = sum(trained_in_core(config, t.directions.rank) for t in targets)
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
