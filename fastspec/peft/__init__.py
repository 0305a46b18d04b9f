"""The bridge to PEFT: `get_peft_model(model, fastspec.peft.SpectralConfig(r=32, task_type="SEQ_CLS"))`.

Importing it makes the method known to PEFT, which reads adapter folders of it only afterwards. PEFT's
list of methods is closed and its hooks for new ones are internal, so the bridge names the one minor
version it was written for.
"""

from __future__ import annotations

import importlib.metadata

from fastspec.availability import install_advice

SUPPORTED = "0.21"


def require_peft() -> None:
    """Check that PEFT is installed in the version this bridge was written for.

    Raises:
        ImportError: it is missing, or of another minor version; the message says what to install.
    """
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"fastspec.peft needs PEFT, which is not installed; {install_advice('peft')}"
        ) from None
    if version.split(".")[:2] != SUPPORTED.split("."):
        raise ImportError(
            f"fastspec.peft was written for PEFT {SUPPORTED}.x and uses its internals, but PEFT {version} "
            f"is installed: pip install 'peft=={SUPPORTED}.*'"
        )


require_peft()

from fastspec.peft.config import PeftType, SpectralConfig  # noqa: E402 - after the version check
from fastspec.peft.conversion import convert_to_lora, save_as_lora  # noqa: E402
from fastspec.peft.files import load_adapter  # noqa: E402
from fastspec.peft.model import SpectralModel, register  # noqa: E402

register()

__all__ = [
    "PeftType",
    "SpectralConfig",
    "SpectralModel",
    "convert_to_lora",
    "load_adapter",
    "save_as_lora",
]
