"""fastspec: adapt pretrained PyTorch models by their spectral coefficients.

Everything public is reached from here and loaded on first use, so that `import fastspec` stays lean:
it builds nothing, touches no GPU and writes no file.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "SpectralConfig": "fastspec.config",
    "SpectralLinear": "fastspec.nn.linear",
    "SpectralConv1D": "fastspec.nn.conv1d",
    "TopkSVD": "fastspec.svd.topk",
    "topk_svd": "fastspec.svd.topk",
    "spectralize": "fastspec.model.convert",
    "merge": "fastspec.model.merging",
    "unmerge": "fastspec.model.merging",
    "keep_merged": "fastspec.model.merging",
    "graphed": "fastspec.model.graphed",
    "merge_and_unload": "fastspec.model.merging",
    "unload": "fastspec.model.merging",
    "trainable_parameters": "fastspec.model.convert",
    "print_trainable_parameters": "fastspec.model.convert",
    "save_adapter": "fastspec.model.adapter",
    "load_adapter": "fastspec.model.adapter",
    "parameter_groups": "fastspec.model.parameter_groups",
    "default_rate": "fastspec.model.rates",
    "load_basis": "fastspec.svd.basis_file",
    "SpectralTrainer": "fastspec.model.checkpoints",
    "AdapterCheckpoints": "fastspec.model.checkpoints",
    "AdapterCallback": "fastspec.model.checkpoints",
    "LightningAdapter": "fastspec.model.lightning",
    "checkpoint_adapters": "fastspec.model.checkpoints",
    "add_task": "fastspec.multitask.api",
    "set_task": "fastspec.multitask.api",
    "replace_task": "fastspec.multitask.api",
    "remove_task": "fastspec.multitask.api",
    "list_tasks": "fastspec.multitask.api",
    "load_tasks": "fastspec.multitask.api",
    "task_bank": "fastspec.multitask.api",
    "tasks": "fastspec.nn.batch_tasks",
    "spectral_linear": "fastspec.ops.functional",
    "task_linear": "fastspec.ops.functional",
    "backends": "fastspec.availability",
}
_SUBPACKAGES = ("peft",)

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from fastspec.availability import backends
    from fastspec.config import SpectralConfig
    from fastspec.model.adapter import load_adapter, save_adapter
    from fastspec.model.checkpoints import (
        AdapterCallback,
        AdapterCheckpoints,
        SpectralTrainer,
        checkpoint_adapters,
    )
    from fastspec.model.convert import (
        print_trainable_parameters,
        spectralize,
        trainable_parameters,
    )
    from fastspec.model.graphed import graphed
    from fastspec.model.lightning import LightningAdapter
    from fastspec.model.merging import keep_merged, merge, merge_and_unload, unload, unmerge
    from fastspec.model.parameter_groups import parameter_groups
    from fastspec.model.rates import default_rate
    from fastspec.multitask.api import (
        add_task,
        list_tasks,
        load_tasks,
        remove_task,
        replace_task,
        set_task,
        task_bank,
    )
    from fastspec.nn.batch_tasks import tasks
    from fastspec.nn.conv1d import SpectralConv1D
    from fastspec.nn.linear import SpectralLinear
    from fastspec.ops.functional import spectral_linear, task_linear
    from fastspec.svd.basis_file import load_basis
    from fastspec.svd.topk import TopkSVD, topk_svd


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module = importlib.import_module(_PUBLIC[name])
        value = getattr(module, name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"fastspec.{name}")
    raise AttributeError(f"module 'fastspec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# In a checkout the folder `kernels/` stands beside this one; installed, it lies inside it.
_here = Path(__file__).parent
if not (_here / "kernels").exists() and (_here.parent / "kernels" / "dispatch.py").exists():
    __path__.append(str(_here.parent))
