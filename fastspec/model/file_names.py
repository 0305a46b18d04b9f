"""Names in adapter files: a model's own, without the `_orig_mod` that `torch.compile` puts into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")
COMPILED = "_orig_mod"


def in_file(name: str) -> str:
    """The name of a module or tensor as files have it."""
    if COMPILED not in name:
        return name
    return ".".join(part for part in name.split(".") if part != COMPILED)


class FileNames:
    """From the names in files to those of a model, which is compiled in part or not."""

    def __init__(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        self._modules = {in_file(n): n for n in names if COMPILED in n}

    def module(self, name: str) -> str:
        return self._modules.get(name, name)

    def tensor(self, name: str) -> str:
        owner, dot, leaf = name.rpartition(".")
        return f"{self.module(owner)}{dot}{leaf}"

    def tensors(self, values: Mapping[str, T]) -> dict[str, T]:
        """The same values by the model's names."""
        return {self.tensor(name): value for name, value in values.items()}

    def config(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """A file's config with the model's names."""
        if not self._modules:
            return dict(meta)
        return {
            **meta,
            "base": self.tensors(meta["base"]),
            "rows": self.tensors(meta["rows"]),
            "state": [self.tensor(name) for name in meta["state"]],
            "layers": {self.module(name): rank for name, rank in meta["layers"].items()},
            "modules_to_save": [self.module(name) for name in meta["modules_to_save"]],
        }
