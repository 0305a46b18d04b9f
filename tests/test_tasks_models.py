"""Many tasks on transformers: heads of different sizes, GPT-2 and its cache, the pretrained encoder."""

import json

import pytest
import torch
from support import assert_close, minilm
from tasks_support import random_values
from tiny_models import bert, gpt2, roberta
from torch import nn

import fastspec
from fastspec import SpectralConfig, spectralize
from fastspec.cli import main

transformers = pytest.importorskip("transformers")

IDS = torch.arange(48).reshape(4, 12) * 5 % 50
LABELS = {"rte": 2, "mnli": 3, "stsb": 1}
NAMES = ["mnli", None, "stsb", "rte"]


MODELS = {
    "bert": bert,
    "roberta": roberta,
    "gpt2, head without bias": lambda: gpt2(task="ForSequenceClassification"),
    "a label for every token": lambda: bert(task="ForTokenClassification"),
}


def with_tasks(make):
    model = spectralize(make(), SpectralConfig(rank=4))
    bank = fastspec.task_bank(model)
    for seed, (name, labels) in enumerate(LABELS.items()):
        fastspec.add_task(model, name, random_values(bank, seed, labels=labels))
    return model


@pytest.fixture(params=MODELS, ids=str)
def make(request):
    return MODELS[request.param]


class TestHeads:
    def test_every_row_has_its_own_tasks_logits(self, make):
        model, base = with_tasks(make), make()
        with torch.no_grad():
            logits = model(IDS, tasks=NAMES).logits
            assert logits.shape[-1] == 3
            assert torch.equal(logits[1, ..., :2], base(IDS).logits[1])
            for row, name in enumerate(NAMES):
                size = LABELS.get(name, 2)
                assert torch.isneginf(logits[row, ..., size:]).all()
                fastspec.set_task(model, name)
                own = model(IDS[row : row + 1]).logits
                assert own.shape[-1] == size
                assert_close(logits[row : row + 1, ..., :size], own)

    def test_heads_grow_with_the_tables(self, make):
        model = with_tasks(make)
        bank = model.task_bank
        for i in range(bank.capacity):
            fastspec.add_task(model, f"t{i}", random_values(bank, 9 + i))
        with torch.no_grad():
            mixed = model(IDS, tasks=["mnli", "t0", None, "t7"]).logits
            for row, name in enumerate(["mnli", "t0", None, "t7"]):
                fastspec.set_task(model, name)
                own = model(IDS[row : row + 1]).logits
                assert_close(mixed[row : row + 1, ..., : own.shape[-1]], own)

    def test_padding_never_wins_and_weighs_nothing(self, make):
        logits = with_tasks(make)(IDS, tasks=NAMES).logits
        sizes = torch.tensor([LABELS.get(n, 2) for n in NAMES])
        sizes = sizes.view(-1, *(1,) * (logits.dim() - 2))
        assert (logits.argmax(-1) < sizes).all()
        assert_close(logits.softmax(-1).sum(-1), torch.ones(logits.shape[:-1]))

    def test_switching_gives_the_model_the_tasks_number_of_labels(self):
        model = with_tasks(bert)
        weight = model.classifier.weight
        fastspec.set_task(model, "rte")
        assert model.classifier.weight is weight, "of the same size: copied in place"
        fastspec.set_task(model, "mnli")
        assert model.num_labels == model.config.num_labels == model.classifier.out_features == 3
        assert model.classifier.weight.requires_grad
        model(IDS, labels=torch.tensor([0, 1, 2, 2])).loss.backward()
        assert model.classifier.weight.grad.any()
        fastspec.set_task(model, None)
        assert model.num_labels == 2
        assert torch.equal(model(IDS).logits, bert()(IDS).logits)

    def test_training_together(self):
        """Each row's own loss: classes and a number in one batch; padding gets no gradient."""
        model = with_tasks(bert)
        bank = model.task_bank.requires_grad_()
        logits = model(IDS, tasks=NAMES).logits
        loss = nn.functional.cross_entropy(logits[[0, 3]], torch.tensor([2, 1]))
        (loss + (logits[2, 0] - 0.5).square()).backward()
        rows = {name: bank.index([name]).item() for name in LABELS}
        grad = model.classifier.weight_table.grad
        assert torch.isfinite(grad).all()
        for name, row in rows.items():
            assert grad[row, : LABELS[name]].any()
            assert not grad[row, LABELS[name] :].any()

    def test_a_wider_head_makes_the_others_wider(self):
        model = with_tasks(bert)
        before = model(IDS, tasks=NAMES).logits
        fastspec.add_task(model, "topics", random_values(model.task_bank, 7, labels=5))
        after = model(IDS, tasks=NAMES).logits
        assert torch.equal(after[..., :3], before)
        assert torch.isneginf(after[..., 3:]).all()

    def test_modules_of_other_kinds_are_switched_but_not_mixed(self):
        model = spectralize(
            bert(), SpectralConfig(rank=4, modules_to_save=["embeddings.word_embeddings"])
        )
        fastspec.add_task(model, "a", random_values(fastspec.task_bank(model), 0))
        fastspec.set_task(model, "a")
        with pytest.raises(ValueError, match=r"word_embeddings\.weight \(Embedding\)"):
            model(IDS, tasks=["a"] * 4)

    def test_a_module_saved_inside_the_body_keeps_its_size(self):
        config = SpectralConfig(rank=4, modules_to_save=["pooler.dense", "classifier"])
        model = spectralize(bert(), config)
        bank = fastspec.task_bank(model)
        assert {slot.name for slot in bank.slots if slot.is_output} == {
            "classifier.weight",
            "classifier.bias",
        }
        fastspec.add_task(model, "a", random_values(bank, 0))
        y = model(IDS, tasks=["a"] * 4).logits
        fastspec.set_task(model, "a")
        assert_close(model(IDS).logits, y)


def test_gradient_checkpointing_is_refused_before_it_is_wrong():
    model = with_tasks(bert).train()
    model.task_bank.requires_grad_()
    layer = model.bert.encoder.layer[1]
    layer.gradient_checkpointing = True  # as transformers' own method sets it
    with pytest.raises(ValueError, match=r"gradient checkpointing.*switch it off"):
        model(IDS, tasks=NAMES)
    layer.gradient_checkpointing = False
    model(IDS, tasks=NAMES)


class TestGPT2:
    def tasks(self):
        model = spectralize(gpt2(), SpectralConfig(rank=4))
        bank = fastspec.task_bank(model)
        for seed, name in enumerate(("a", "b")):
            fastspec.add_task(model, name, random_values(bank, seed))
        return model

    def test_logits_with_and_without_the_cache(self):
        model, names = self.tasks(), ["b", "a", None, "b"]
        with torch.no_grad(), fastspec.tasks(names):
            whole = model(IDS).logits
            first = model(IDS[:, :9], use_cache=True)
            rest = model(IDS[:, 9:], past_key_values=first.past_key_values).logits
        assert_close(rest, whole[:, 9:])
        for row, name in enumerate(names):
            fastspec.set_task(model, name)
            assert_close(whole[row : row + 1], model(IDS[row : row + 1]).logits)
        with torch.no_grad():
            assert torch.equal(whole[2], gpt2()(IDS).logits[2])

    def test_generate(self):
        model, names = self.tasks(), ["b", None, "a", "b"]
        options = {"max_new_tokens": 6, "do_sample": False}
        with fastspec.tasks(names):
            together = model.generate(IDS, **options)
        for row, name in enumerate(names):
            fastspec.set_task(model, name)
            assert torch.equal(
                together[row : row + 1], model.generate(IDS[row : row + 1], **options)
            )

    def test_beams_are_rows_too(self):
        model = self.tasks()
        options = {"max_new_tokens": 4, "num_beams": 3}
        names = ["b", None, "a", "b"]
        with fastspec.tasks([name for name in names for _ in range(3)]):
            by_beams = model.generate(IDS, **options)
        with fastspec.tasks(names):
            together = model.generate(IDS, **options)
        assert torch.equal(by_beams, together)
        for row, name in enumerate(names):
            fastspec.set_task(model, name)
            assert torch.equal(
                together[row : row + 1], model.generate(IDS[row : row + 1], **options)
            )


def test_serve_bench(tmp_path, capsys):
    bert().save_pretrained(tmp_path / "model")
    out = tmp_path / "figures.json"
    options = ["--tasks", "9", "--rank", "4", "--batch", "3", "--length", "5", "--rounds", "2"]
    assert main(["serve-bench", str(tmp_path / "model"), *options, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "9 tasks, 3 x 5 tokens" in printed
    figures = json.loads(out.read_text())
    float32, k, layers, classes = 4, 4, 2 * 6 + 1, 2
    assert figures["coefficient_bytes"] == 9 * layers * k * float32
    assert figures["head_bytes"] == 9 * classes * (16 + 1) * float32
    square, mlp = 16 + 16 + 1, 16 + 32 + 1  # numbers a direction of u, vh and s
    assert figures["basis_bytes"] == float32 * k * (2 * (4 * square + 2 * mlp) + square)
    assert set(figures["ratios"]) == {
        "every row its own task",
        "every row the same task",
        "the active task alone",
    }
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert main(["serve-bench", str(tmp_path / "model"), "--tasks", "0"]) == 2
    assert "--tasks must be at least 1" in capsys.readouterr().err


def test_the_pretrained_encoder():
    model = spectralize(minilm(), SpectralConfig(rank=32))
    bank = fastspec.task_bank(model)
    for seed, name in enumerate(("a", "b")):
        fastspec.add_task(model, name, random_values(bank, seed, scale=0.05))
    ids = torch.arange(60).reshape(3, 20) * 37 + 1000
    with torch.no_grad():
        mixed = model(ids, tasks=["b", None, "a"]).logits
        assert torch.equal(mixed[1], minilm()(ids).logits[1])
        for row, name in ((0, "b"), (2, "a")):
            fastspec.set_task(model, name)
            own = model(ids[row : row + 1]).logits
            assert_close(mixed[row : row + 1], own)
            assert not torch.allclose(own, mixed[1:2], rtol=0.01)
