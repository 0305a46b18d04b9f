"""A tiny BERT with a tokenizer, a tiny GLUE folder and a suite of runs that take no time."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from fastspec.studies.core_maps import TIED_PER_LAYER
from fastspec.studies.glue.table_rows import Row

# fmt: off
WORDS = [
    "a", "the", "man", "woman", "dog", "cat", "child", "bird", "runs", "walks", "sees", "hears",
    "likes", "fears", "big", "small", "red", "old", "quickly", "slowly", "not", "never", "always",
    "here", "there", "and", "but", "house", "tree", "river", "stone",
]
# fmt: on


def trained_by_map(k: int) -> dict[str, int]:
    """How many numbers a layer of rank k trains, by what makes its core; where they are tied, its share."""
    return {
        "hartley": 2 * k,
        "hartley-diagonal": 3 * k,
        "hartley-4": 8 * k,
        "cayley": k * (k - 1) // 2 + 2 * k,
        "tied": TIED_PER_LAYER,
        "left": k * k,
        "right": k * k,
    }


def word_tokenizer(words: list[str]) -> Any:
    """A token for every word, after the special ones of BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def make_model(folder: Path, layers: int = 2) -> Path:
    """A randomly initialised BERT of 32 dimensions with a word-level tokenizer, saved to `folder`."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = word_tokenizer(WORDS)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
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


ROWS = (
    Row("a", {"rank": 4}, (1e-3, 1e-2, 1e-1), seeds=3),
    Row("a, reference path", {"rank": 4, "path": "reference"}, seeds=2, like="a"),
    Row("scratch", {"method": "full", "start": "random"}, (1e-4, 1e-3)),
    Row("b", {"rank": 4}, (1e-3, 1e-2), basis_of="scratch"),
)
# the score rises with the rate up to 1e-2 and falls with the seed; 1e-1 diverges
INSTANT_RUN = """
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


def instant_run(config, folder: Path, threads: int) -> list[str]:
    """In place of `processes.command`: a run of `ROWS` that knows its score."""
    return [sys.executable, "-c", INSTANT_RUN, str(folder), json.dumps(config.to_dict())]
