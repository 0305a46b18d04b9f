"""Named configurations of the spectral method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ATTENTION = r".*(query|key|value|attention\.output\.dense|[qkvo]_proj)"
VALUES = r".*(value|attention\.output\.dense|[vo]_proj)"
MLP = r".*layer\.\d+\.(intermediate|output)\.dense"

# name to fields of `GlueConfig`; what docs/results.md says about them is why they are here
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "coefficients": {"core": "diag", "rank": "full"},
    "band": {"core": "band", "rank": "full"},
    # as many parameters on BERT, at a step near the frozen floor's
    "values": {"core": "band", "rank": "full", "half_width": 4, "target_modules": VALUES},
    "dense": {"core": "dense", "rank": 32},
}
