"""Blocks of tokens from Python's own documentation, to train on and to be judged by."""

from __future__ import annotations

import hashlib
import inspect
import random
from typing import Any

import torch
from torch import Tensor

from fastspec.studies.documentation import documentation

MIN_CHARACTERS = 200  # shorter docstrings say little that a model could learn from
EVERY = 10  # of ten files, one is held out


def texts() -> tuple[list[str], list[str]]:
    """(training, held-out) texts. Whole files are held out, so that no text is on both sides."""
    files: dict[str, list[str]] = {}
    for place, text in documentation():
        clean = inspect.cleandoc(text)
        if len(clean) >= MIN_CHARACTERS:
            files.setdefault(place, []).append(clean)
    train: dict[str, None] = {}
    held: dict[str, None] = {}
    for i, (_, found) in enumerate(sorted(files.items())):
        (held if i % EVERY == 0 else train).update(dict.fromkeys(found))
    return list(train), [text for text in held if text not in train]


def digest(*parts: list[str]) -> str:
    """SHA-256 of the texts, in hexadecimal."""
    return hashlib.sha256("\0\0".join("\0".join(part) for part in parts).encode()).hexdigest()


def blocks(texts: list[str], tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """[count, length] token numbers: the texts in an order of the seed, one after the other.

    Raises:
        ValueError: the texts are too short for that.
    """
    texts = list(texts)
    random.Random(seed).shuffle(texts)
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        if end is not None:
            stream.append(end)
        if len(stream) >= count * length:
            return torch.tensor(stream[: count * length]).reshape(count, length)
    raise ValueError(
        f"{len(texts)} texts have {len(stream)} tokens, {count} blocks of {length} need "
        f"{count * length}: take fewer steps"
    )
