"""What base-size encoders need: layers by role on any of them, a suite of their own, and a model's name."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch
from glue_support import make_model

import fastspec
from fastspec.model.targets import spectral_layers
from fastspec.studies.encoders import public_name
from fastspec.studies.glue import table_rows
from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.methods import body_linears, head_modules
from fastspec.studies.glue.presets import PRESETS, TARGETS
from fastspec.studies.glue.processes import make
from fastspec.studies.glue.record import check_alike, command_text, read_csv, to_csv
from fastspec.studies.glue.suite import Job, Suite
from fastspec.studies.glue.table_rows import (
    OTHER_TASKS,
    SUITE_SIZES,
    SUITES,
    TASK_SIZES,
    Row,
    TaskSize,
)

RECORD = Path(__file__).parent.parent / "docs" / "results-glue-base.csv"
BASE = SUITES["base"]

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_words": 40}
DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40}
T5 = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 8, "vocab_size": 40}
XLNET = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 40}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
POSITIONS = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}

BERT = "query key value attention.output.dense", "intermediate.dense layer.N.output.dense"
# configuration and its fields; the parts of names that attention's and the MLP's layers end in
ENCODERS = {
    "BertConfig": (SIZE, *BERT),
    "RobertaConfig": (SIZE, *BERT),
    "ElectraConfig": (SIZE, *BERT),
    "DebertaConfig": (SIZE | POSITIONS, "in_proj attention.output.dense", BERT[1]),
    "DebertaV2Config": (
        SIZE | POSITIONS,
        "self.query_proj self.key_proj self.value_proj attention.output.dense",
        BERT[1],
    ),
    "MPNetConfig": (SIZE, "attn.q attn.k attn.v attn.o", BERT[1]),
    "DistilBertConfig": (DISTILBERT, "q_lin k_lin v_lin out_lin", "ffn.lin1 ffn.lin2"),
    "XLMConfig": (XLM, "q_lin k_lin v_lin out_lin", "ffns.N.lin1 ffns.N.lin2"),
    "AlbertConfig": (SIZE, "query key value attention.dense", "ffn ffn_output"),
    "ModernBertConfig": (SIZE | TOKENS, "attn.Wqkv attn.Wo", "mlp.Wi mlp.Wo"),
    "LlamaConfig": (
        SIZE,
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj",
        "gate_proj up_proj down_proj",
    ),
    "T5Config": (
        T5,
        " ".join(f"{kind}Attention.{name}" for kind in ("Self", "EncDec") for name in "qkvo"),
        "DenseReluDense.wi DenseReluDense.wo",
    ),
    # its attention holds bare parameters
    "XLNetConfig": (XLNET, "", "ff.layer_1 ff.layer_2"),
}
NO_VALUES = re.compile(r"(query|key|q|k)(_proj|_lin)?")


def classifier(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, name)(**ENCODERS[name][0])
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("name", ENCODERS)
def test_layers_by_role_on_every_encoder(name):
    model = classifier(name)
    heads = head_modules(model, train_pooler=True)
    every = body_linears(model, heads, "all-linear")
    attention, mlp = (parts.split() for parts in ENCODERS[name][1:])
    values = [part for part in attention if not NO_VALUES.fullmatch(part.split(".")[-1])]
    for role, parts in (("attention", attention), ("values", values), ("mlp", mlp)):
        ends = tuple("." + part for part in parts)
        wanted = [n for n in every if re.sub(r"\.\d+\.", ".N.", n).endswith(ends)] if ends else []
        if wanted:
            assert all(any(re.sub(r"\.\d+\.", ".N.", n).endswith(e) for n in wanted) for e in ends)
            assert body_linears(model, heads, TARGETS[role]) == wanted, role
        else:
            with pytest.raises(ValueError, match="matches no linear layer below the head"):
                body_linears(model, heads, TARGETS[role])


@pytest.mark.parametrize("name", [n for n in ENCODERS if n != "XLNetConfig"])
def test_the_preset_of_values_takes_every_encoder(name):
    model = classifier(name)
    heads = head_modules(model, train_pooler=True)
    config = GlueConfig("cola", train_pooler=True, **PRESETS["values"])
    wanted = body_linears(model, heads, TARGETS["values"])
    adapted = fastspec.spectralize(model, config.spectral(heads))
    assert [n for n, _ in spectral_layers(adapted)] == wanted


def test_a_role_that_a_model_has_not_is_an_error():
    model = classifier("XLNetConfig")
    config = GlueConfig("cola", **PRESETS["values"])
    with pytest.raises(ValueError, match="matches no linear layer; the model has: transformer"):
        fastspec.spectralize(model, config.spectral(head_modules(model)))


def test_the_other_suites_patterns_mean_the_same_layers_of_bert():
    model = classifier("BertConfig")
    heads = head_modules(model, train_pooler=True)
    for role, pattern in TARGETS.items():
        ours = getattr(table_rows, role.upper())
        assert body_linears(model, heads, ours) == body_linears(model, heads, pattern)


def test_the_base_suite_has_its_own_sizes(tmp_path):
    sizes = SUITE_SIZES["base"]
    s = Suite(tmp_path, BASE, tasks=tuple(sizes), sizes=sizes)
    band = s.row("band")
    assert [s.seeds_of(task, band) for task in ("cola", "sst2", "rte")] == [3, 3, 1]
    assert [s.seeds_of("cola", s.row(name)) for name in ("head", "dense 32")] == [1, 1]
    assert {len(row.rates) for row in BASE} == {2, 3}
    assert s.config(Job("cola", band, 5e-3, 0)).epochs == 3
    assert Suite(tmp_path, BASE).config(Job("cola", band, 5e-3, 0)).epochs == 4
    assert s.config(Job("qnli", band, 5e-3, 0)).max_train_rows == OTHER_TASKS.max_train_rows
    command = command_text(s.config(Job("rte", s.row("band 4, values and outputs"), 5e-3, 0)))
    assert "--target-modules values --lr 0.005" in command
    assert all(size.seeds is None for size in TASK_SIZES.values())


def test_a_task_may_have_fewer_seeds(tmp_path, fake):
    row = Row("a", {"rank": 4}, (1e-3, 1e-2), seeds=3)
    sizes = {"cola": TaskSize(1), "rte": TaskSize(1, seeds=1)}
    s = Suite(tmp_path, (row,), tasks=("cola", "rte"), sizes=sizes)
    make(s, jobs=1, threads=1, announce=lambda _: None)
    found = {task: [(run.rate, run.seed) for run in s.runs(task, row)] for task in s.tasks}
    assert found["cola"] == [(1e-3, 0), *((1e-2, seed) for seed in range(3))]
    assert found["rte"] == [(1e-3, 0), (1e-2, 0)]
    # one seed is all there is to have, so the table names nothing as missing
    from fastspec.studies.glue import report

    line = next(x for x in report.markdown(s).splitlines() if x.startswith("| a |"))
    assert "69.0 (68.0 to 70.0) | 70.0 |" in line


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\na: en\n# a comment\n---\n\n\n# small-encoder-v2\nText.\n", "small-encoder-v2"),
        ("# small-encoder-v2\n", "small-encoder-v2"),
        ("# A model of ours\n# other\n", "folder"),
        ("Text first.\n# small-encoder-v2\n", "folder"),
        (None, "folder"),
    ],
)  # fmt: skip
def test_a_model_goes_by_its_own_name(tmp_path, card, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    assert public_name(str(folder)) == name
    assert public_name("org/encoder") == "org/encoder"
    assert public_name(str(tmp_path / "gone")) == "gone"


def test_another_folder_of_the_same_model_is_the_same_run(tmp_path, fake):
    card = "---\nlicense: apache-2.0\n---\n# tiny-encoder\n"
    for name in ("here", "elsewhere"):
        folder = make_model(tmp_path / name / f"model-{name}")
        (folder / "README.md").write_text(card)
    row = Row("a", {"rank": 4}, (1e-3, 1e-2))
    first = Suite(
        tmp_path / "runs",
        (row,),
        tasks=("rte",),
        model=str(tmp_path / "here" / "model-here"),
        record=tmp_path / "record.csv",
    )
    make(first, jobs=1, threads=1, announce=lambda _: None)
    text = first.record.read_text()
    assert str(tmp_path) not in text
    assert {shlex.split(run.command)[5] for run in read_csv(first.record)} == {"tiny-encoder"}
    second = dataclasses.replace(
        first,
        output=tmp_path / "other runs",
        model=str(tmp_path / "elsewhere" / "model-elsewhere"),
    )
    assert second.stale() == []
    make(second, jobs=1, threads=1, announce=lambda _: None)
    assert not second.output.exists()
    assert first.record.read_text() == text
    # the name is no proof of the weights: their digest is
    a, b = read_csv(first.record)
    with pytest.raises(ValueError, match="pretrained model differ by fingerprint"):
        check_alike(a, dataclasses.replace(b, fingerprint="another"))


def test_the_record_of_the_base_suite_counts_today(tmp_path):
    if not RECORD.exists():
        pytest.skip("no run of it is recorded yet")
    record = read_csv(RECORD)
    s = Suite(
        tmp_path,
        table_rows.with_reference(BASE),
        model="all-mpnet-base-v2",
        record=RECORD,
        sizes=SUITE_SIZES["base"],
        overrides={"bf16": True},
    )
    assert s.stale() == []
    assert len(s.all_runs()) == len(record)
    assert RECORD.read_text() == to_csv(record)
