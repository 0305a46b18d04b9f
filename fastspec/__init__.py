"""fastspec: adapt pretrained PyTorch models by their spectral coefficients.

Everything public is reached from here and loaded on first use, so that `import fastspec` stays lean:
it builds nothing, touches no GPU and writes no file.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "SpectralConfig": "fastspec.config",
    "SpectralLinear": "fastspec.nn",
    "SpectralConv1D": "fastspec.conv1d",
    "TopkSVD": "fastspec.svd",
    "topk_svd": "fastspec.svd",
    "spectralize": "fastspec.convert",
    "merge": "fastspec.convert",
    "unmerge": "fastspec.convert",
    "keep_merged": "fastspec.convert",
    "trainable_parameters": "fastspec.convert",
    "print_trainable_parameters": "fastspec.convert",
    "save_adapter": "fastspec.adapter",
    "load_adapter": "fastspec.adapter",
    "parameter_groups": "fastspec.optim",
    "add_task": "fastspec.multitask.tasks",
    "set_task": "fastspec.multitask.tasks",
    "replace_task": "fastspec.multitask.tasks",
    "remove_task": "fastspec.multitask.tasks",
    "list_tasks": "fastspec.multitask.tasks",
    "load_tasks": "fastspec.multitask.tasks",
    "task_bank": "fastspec.multitask.tasks",
    "tasks": "fastspec.multitask.rows",
    "spectral_linear": "fastspec.functional",
    "task_linear": "fastspec.multitask.functional",
    "backends": "fastspec.availability",
}
_SUBPACKAGES = ("peft",)

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from fastspec.adapter import load_adapter, save_adapter
    from fastspec.availability import backends
    from fastspec.config import SpectralConfig
    from fastspec.conv1d import SpectralConv1D
    from fastspec.convert import (
        keep_merged,
        merge,
        print_trainable_parameters,
        spectralize,
        trainable_parameters,
        unmerge,
    )
    from fastspec.functional import spectral_linear
    from fastspec.multitask.functional import task_linear
    from fastspec.multitask.rows import tasks
    from fastspec.multitask.tasks import (
        add_task,
        list_tasks,
        load_tasks,
        remove_task,
        replace_task,
        set_task,
        task_bank,
    )
    from fastspec.nn import SpectralLinear
    from fastspec.optim import parameter_groups
    from fastspec.svd import TopkSVD, topk_svd


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


def _find_kernels() -> None:
    """In a checkout that was not installed, name the folder `kernels/` beside this one as it is installed."""
    here = Path(__file__).parent
    beside = here.parent / "kernels" / "__init__.py"
    if (here / "kernels").exists() or not (beside.parent / "dispatch.py").exists():
        return
    spec = importlib.util.spec_from_file_location("fastspec.kernels", beside)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["fastspec.kernels"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    globals()["kernels"] = module


_find_kernels()
