"""Lightning checkpoints that hold adapters in place of the models they belong to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastspec.files import ADAPTER_FILE
from fastspec.model.adapter import load_adapter, save_adapter
from fastspec.model.convert import adaptation
from fastspec.model.file_names import FileNames, in_file

KEY = "fastspec_adapters"


class LightningAdapter:
    """Mixin for a `LightningModule`: `class Classifier(fastspec.LightningAdapter, LightningModule)`.

    In checkpoints, every spectralized model below the module is its adapter, the file that `save_adapter`
    writes; everything else of the module is stored as ever. What a checkpoint lacks, the frozen base, is in
    the module that resumes or that `load_from_checkpoint` makes: its `__init__` loads the base model and
    calls `spectralize`. The file's bytes are `checkpoint["fastspec_adapters"][name]`.

    Raises:
        ValueError: at saving, if nothing in the module is spectralized.
        AdapterError: at loading, for other base weights or another adaptation.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        models = dict(self._adapted())
        if not models:
            raise ValueError(
                "nothing in the module is adapted: call fastspec.spectralize(model, config) in its __init__"
            )
        state, adapters = checkpoint["state_dict"], {}
        with tempfile.TemporaryDirectory() as folder:
            for name, model in models.items():
                content = bytearray((save_adapter(model, folder) / ADAPTER_FILE).read_bytes())
                # a tensor, since torch.load reads those without trusting the file
                adapters[name] = torch.frombuffer(content, dtype=torch.uint8)
        for name in models:
            for key in [key for key in state if key.startswith(_prefix(name))]:
                del state[key]
        checkpoint[KEY] = {in_file(name): content for name, content in adapters.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if KEY not in checkpoint:
            raise ValueError(
                f"the checkpoint has no {KEY!r}: it was written by a module without LightningAdapter"
            )
        names = FileNames(self)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            for stored, content in checkpoint[KEY].items():
                (Path(folder) / ADAPTER_FILE).write_bytes(content.numpy().tobytes())
                name = names.module(stored)
                model: nn.Module = self.get_submodule(name)  # type: ignore[attr-defined]
                load_adapter(model, folder)
                # Lightning goes on to load the whole state: what is there already is the rest of it
                state = model.state_dict(prefix=_prefix(name))
                checkpoint["state_dict"] = {**state, **checkpoint["state_dict"]}

    def _adapted(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if "spectral" in vars(module) and adaptation(module) is not None:
                yield name, module


def _prefix(name: str) -> str:
    return f"{name}." if name else ""
