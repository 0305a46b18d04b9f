"""csrc/ where it is built: loaded by the modules whose operators it serves, and told what both hold to."""

from __future__ import annotations

import torch

from fastspec import _extension
from fastspec.ops import aten


def load() -> None:
    """Let csrc/ serve the CPU from here on, autograd included, where it loads."""
    if _extension.load() is None:
        torch.ops.fastspec.set_short_limits(aten.SIGMA_FLOOR, aten.BIAS_CEILING)
