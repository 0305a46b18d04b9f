"""English sentences from the documentation in Python itself, for a task that needs no files."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from fastspec.studies.documentation import documentation

# words and commas only: no code, no markup, nothing that would give a swapped pair away
_SENTENCE = re.compile(r"[A-Z][a-z]*(?: [A-Za-z][a-z'-]*,?)+\.")
WORDS = range(8, 26)


def sentences() -> list[str]:
    """Every plain sentence of 8 to 25 words, once, in a fixed order."""
    return list(dict.fromkeys(s for _, text in documentation() for s in _plain_sentences(text)))


def _plain_sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=\.) (?=[A-Z])", " ".join(paragraph.split())):
            if len(sentence.split()) in WORDS and _SENTENCE.fullmatch(sentence):
                yield sentence


def swap_rows(texts: list[str], seed: int = 0) -> list[tuple[str, int]]:
    """(sentence, label) rows in a shuffled order, half of them swapped: 1 intact, 0 swapped.

    Swapped are two neighbouring words that differ, neither the first (its capital would show) nor
    the last, and neither followed by a comma.
    """
    rng = random.Random(seed)
    texts = list(texts)
    rng.shuffle(texts)
    rows = []
    for i, text in enumerate(texts):
        words = text.split()
        places = [
            j
            for j in range(1, len(words) - 2)
            if words[j].lower() != words[j + 1].lower()
            and not words[j].endswith(",")
            and not words[j + 1].endswith(",")
        ]
        if i % 2 == 0 and places:
            j = rng.choice(places)
            words[j], words[j + 1] = words[j + 1], words[j]
            rows.append((" ".join(words), 0))
        else:
            rows.append((text, 1))
    return rows
