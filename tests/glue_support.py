"""A tiny BERT with a tokenizer and a tiny GLUE folder, made at test time."""

from __future__ import annotations

import random
from pathlib import Path

# fmt: off
WORDS = [
    "a", "the", "man", "woman", "dog", "cat", "child", "bird", "runs", "walks", "sees", "hears",
    "likes", "fears", "big", "small", "red", "old", "quickly", "slowly", "not", "never", "always",
    "here", "there", "and", "but", "house", "tree", "river", "stone",
]
# fmt: on


def make_model(folder: Path, layers: int = 2) -> Path:
    """A randomly initialised BERT of 32 dimensions with a word-level tokenizer, saved to `folder`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))


def write_tsv(path: Path, columns: tuple[str, ...], rows: list[tuple]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in [columns, *rows]]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def make_task(root: Path, task, train: int = 48, dev: int = 20, seed: int = 0) -> Path:
    """`root`/<folder>/*.tsv for `task`, with the hub's columns; the label follows from the words."""
    from fastspec.studies.glue.tasks import TASKS

    rng = random.Random(seed)
    trained = TASKS[task.trains_on] if task.trains_on else task
    splits = {"train": train, **{names[0]: dev for names in trained.dev.values()}}
    for split, count in splits.items():
        path = root / trained.folder / f"{split}.tsv"
        write_tsv(path, (*trained.text, "label", "idx"), _rows(rng, trained, count))
    for names in task.test.values():
        rows = [(*r[:-2], -1, r[-1]) for r in _rows(rng, task, dev)]
        write_tsv(root / task.folder / f"{names[0]}.tsv", (*task.text, "label", "idx"), rows)
    return root


def _rows(rng: random.Random, task, count: int) -> list[tuple]:
    rows = []
    for i in range(count):
        texts = [sentence(rng) for _ in task.text]
        negative = sum("not" in t.split() or "never" in t.split() for t in texts)
        if task.labels is None:
            label: float = round(5 / (1 + len(texts[0].split())) * (1 + negative), 3) % 5
        else:
            label = (negative + i % 2) % len(task.labels)
        rows.append((*texts, label, i))
    return rows
