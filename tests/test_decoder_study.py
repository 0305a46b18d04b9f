"""`fastspec decoder` in miniature, its search, its record, and the table in docs/decoders.md."""

import dataclasses
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from glue_support import word_tokenizer
from tiny_models import llama

import fastspec
from fastspec.cli import main
from fastspec.studies.decoder import record, text
from fastspec.studies.decoder.finetune import adapt, held_out_loss, load, train
from fastspec.studies.decoder.record import Run
from fastspec.studies.decoder.rows import REFERENCE, ROWS, Row, next_rate, place, rate

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")
DOCS = Path(__file__).parent.parent / "docs"
RUN = Run("a", 0.01, 0, 0.02, 2.5, 10, 1000, 2, 2, 8, 2, "m", "t")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    words = Counter(word for t in text.texts()[0][:300] for word in re.findall(r"\w+", t))
    tokenizer = word_tokenizer([word for word, _ in words.most_common(100)])
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
    llama(vocab_size=len(tokenizer), **sizes).save_pretrained(folder)
    return folder


def command(model, path, *words):
    sizes = ("--steps", "6", "--batch", "2", "--length", "16", "--held-out", "4", "--threads", "1")
    return ["decoder", "--model", str(model), "--record", str(path), *sizes, *words]


class TestText:
    def test_no_text_is_on_both_sides(self):
        training, held = text.texts()
        assert len(training) > 5 * len(held) > 50
        assert not set(training) & set(held)
        assert min(map(len, training + held)) >= text.MIN_CHARACTERS

    def test_blocks_are_the_texts_in_an_order_of_the_seed(self, model):
        tokenizer = load(str(model))[1]
        a, b, c = (text.blocks(["one", "two"] * 50, tokenizer, 3, 16, seed) for seed in (0, 0, 1))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert a.shape == (3, 16)
        with pytest.raises(ValueError, match=r"blocks of 16 need 16000: take fewer steps"):
            text.blocks(["one"], tokenizer, 1000, 16, 0)


class TestSearch:
    def test_the_ladder(self):
        assert [rate(i) for i in (-6, -5, -1, 0)] == [1e-3, 3e-3, 0.3, 1.0]
        assert all(place(rate(i)) == i for i in range(-12, 3))
        assert all(row.start == rate(place(row.start)) for row in ROWS)

    @pytest.mark.parametrize("best", [1e-3, 1e-2, 3e-1])
    def test_it_ends_with_both_neighbours_of_the_best(self, best):
        tried = {}
        while (new := next_rate(1e-2, tried)) is not None:
            tried[new] = abs(math.log(new / best))
        assert min(tried, key=tried.get) == best
        assert {rate(place(best) + 1), rate(place(best) - 1)} <= tried.keys()

    def test_rates_that_diverge_end_it_too(self):
        tried = {}
        while (new := next_rate(1e-2, tried)) is not None:
            tried[new] = math.inf if new > 2e-3 else 1.0 + 1e-3 / new
        assert min(tried, key=tried.get) == 1e-3

    def test_the_default_rate_and_the_seeds_follow(self):
        rows = [Row("b", 1e-2), Row("a", 1e-2, seeds=2)]
        runs, order = [], []
        while (job := record.next_run(rows, runs)) is not None:
            row, value, seed = job
            order.append((row.name, value, seed))
            loss = 1 + abs(math.log(value / 1e-2))
            runs.append(dataclasses.replace(RUN, row=row.name, rate=value, seed=seed, loss=loss))
        searches = [(0.01, 0), (0.03, 0), (0.003, 0), (0.02, 0)]
        assert order == [("a", *s) for s in (*searches, (0.01, 1))] + [("b", *s) for s in searches]


class TestRecord:
    def test_it_is_read_as_it_was_written(self, tmp_path):
        path = tmp_path / "record.csv"
        runs = [RUN, dataclasses.replace(RUN, rate=0.03, loss=None, default=None)]
        for run in reversed(runs):
            record.add(path, run)
        record.add(path, RUN)
        assert record.read(path) == runs
        record.add(path, dataclasses.replace(RUN, seed=1, steps=3))
        with pytest.raises(ValueError, match="runs of two settings"):
            record.read(path)

    def test_the_table(self):
        rows = [Row(REFERENCE, 1e-3, "lora", 8, seeds=1), Row("a", 1e-2, seeds=3), Row("c", 1e-2)]
        runs = [dataclasses.replace(RUN, row=REFERENCE, rate=1e-3, loss=2.0, default=None)]
        runs += [dataclasses.replace(RUN, rate=r, loss=x) for r, x in ((0.003, 2.4), (0.01, 2.1))]
        runs += [dataclasses.replace(RUN, rate=r, loss=x) for r, x in ((0.03, None), (0.02, 2.2))]
        runs += [dataclasses.replace(RUN, seed=1, loss=2.05)]
        lines = record.table(rows, runs).splitlines()
        assert lines[3] == (
            "| a | 10 (1.000 %) | 2.075 (2.050 to 2.100), 2 of 3 seeds | +3.8 % | 0.01 | 0.02: 2.200 | "
            "0.003: 2.400; 0.01: 2.100; 0.03: diverged |"
        )
        assert lines[2].endswith("| +0.0 % | 0.001, search unfinished |  | 0.001: 2.000 |")
        assert len(lines) == 4, "what was not run has no line"

    def test_a_row_is_compared_with_lora_s_runs_of_its_own_seeds(self):
        rows = [Row(REFERENCE, 1e-3, "lora", 8, seeds=3), Row("a", 1e-2)]
        lora = dataclasses.replace(RUN, row=REFERENCE, rate=1e-3, default=None)
        runs = [dataclasses.replace(lora, seed=i, loss=2.0 + i) for i in range(3)]
        runs.append(dataclasses.replace(RUN, loss=2.1))
        assert "| 3.000 (2.000 to 4.000) | +0.0 % |" in record.table(rows, runs)
        assert "| 2.100 | +5.0 % |" in record.table(rows, runs)


class TestRuns:
    def test_the_command_goes_on_from_its_record(self, model, tmp_path, capsys, monkeypatch):
        path = tmp_path / "record.csv"
        few = tuple(
            dataclasses.replace(
                row, seeds=min(row.seeds, 2), rank=4 if row.rank == 35 else row.rank
            )
            for row in ROWS
            if row.name in (REFERENCE, "dense 35")
        )
        monkeypatch.setattr("fastspec.studies.commands.decoder.ROWS", few)
        assert main(command(model, path)) == 0
        runs, printed = record.read(path), capsys.readouterr().out
        assert record.table(few, runs) in printed
        assert "unfinished" not in printed
        ours = [run for run in runs if run.row == "dense 35"]
        assert {run.seed for run in ours} == {0, 1}
        assert all(run.default in {r.rate for r in ours} for run in ours)
        assert all(run.trained == 14 * 16 for run in ours)
        assert next(run.loss for run in runs if run.row == "pretrained") > min(r.loss for r in ours)

        whole = path.read_text()
        gone = next(line for line in whole.splitlines() if line.startswith("dense 35,"))
        path.write_text(whole.replace(gone + "\n", ""))
        assert main(command(model, path)) == 0
        assert path.read_text() == whole, "the run that was missing, made again bit for bit"
        assert capsys.readouterr().out.count(": held-out loss ") == 1

    def test_unknown_rows_and_no_model(self, tmp_path, capsys):
        assert main(["decoder", "--rows", "dense 7"]) == 2
        assert "no row is named 'dense 7'" in capsys.readouterr().err
        assert main(["decoder"]) == 2
        assert "name a model" in capsys.readouterr().err

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
    def test_every_row_trains_its_numbers_alone(self, model, row):
        """Of this model's 64 directions; a rank above that is all it has."""
        plain, tokenizer = load(str(model))
        before = {n: p.clone() for n, p in plain.named_parameters()}
        small = dataclasses.replace(
            row, rank=min(row.rank, 64) if isinstance(row.rank, int) else row.rank
        )
        adapted, groups = adapt(plain, small, row.start, 0)
        training, held = text.texts()
        batches = text.blocks(training, tokenizer, 12, 16, 0).reshape(6, 2, 16)
        assert train(adapted, groups, batches)
        after = {n.replace("base_model.model.", "").replace("base_layer.", ""): p
                 for n, p in adapted.named_parameters()}  # fmt: skip
        assert all(torch.equal(p, after[n]) for n, p in before.items())
        moved = [bool(p.any()) for g in groups for p in g["params"]]
        assert all(moved)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert trained == sum(p.numel() for g in groups for p in g["params"])
        assert math.isfinite(held_out_loss(adapted, text.blocks(held, tokenizer, 4, 16, 0)))

    def test_training_ends_where_the_loss_is_not_finite(self, model):
        plain, tokenizer = load(str(model))
        adapted, groups = adapt(plain, Row("a", 1.0, rank=4), 1e9, 0)
        batches = text.blocks(text.texts()[0], tokenizer, 12, 16, 0).reshape(6, 2, 16)
        with torch.no_grad():
            adapted.lm_head.weight.fill_(math.inf)
        seen = []
        assert not train(adapted, groups, batches, lambda step, loss: seen.append(step))
        assert not seen


def test_the_page_holds_the_table_of_the_record():
    runs = record.read(DOCS / "results-decoders.csv")
    page = (DOCS / "decoders.md").read_text()
    (shown,) = re.findall(r"<!-- decoder -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert shown == record.table(ROWS, runs)
    assert all(run.row in {"pretrained", *(row.name for row in ROWS)} for run in runs)


def test_the_page_is_brought_up_to_date(tmp_path, capsys):
    path, page = tmp_path / "record.csv", tmp_path / "page.md"
    record.add(path, dataclasses.replace(RUN, row="dense 35"))
    page.write_text("above\n<!-- decoder -->\nold\n<!-- end -->\nbelow\n")
    command = ["decoder", "--report", "--record", str(path), "--page", str(page)]
    assert main(command) == 0
    table = record.table(ROWS, record.read(path))
    assert page.read_text() == f"above\n<!-- decoder -->\n{table}\n<!-- end -->\nbelow\n"
    assert "| dense 35 |" in table
    page.write_text("above\n")
    assert main(command) == 2
    assert "no place for the table" in capsys.readouterr().err


def test_the_default_rate_is_the_models(model):
    adapted, _ = adapt(load(str(model))[0], ROWS[1], 1e-2, 0)
    assert fastspec.default_rate(adapted) > 0
