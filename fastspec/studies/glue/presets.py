"""Named configurations of the spectral method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# what transformers' models call the parts of a layer; a product of queries, keys and values in one matrix
# counts to each of the three
_FUSED = r"Wqkv|attention\.self\.in_proj"
_OUTPUT = r"attention\.(output\.)?dense|o|o_proj|out_lin|attn\.Wo"
VALUES = rf".*\.(value|value_proj|v|v_proj|v_lin|{_FUSED}|{_OUTPUT})"
ATTENTION = rf".*\.((query|key|value)(_proj)?|[qkv](_proj|_lin)?|{_FUSED}|{_OUTPUT})"
MLP = (
    r".*\.(layer\.\d+\.(intermediate|output)\.dense|ffns?(\.\d+)?\.lin[12]|ffn|ffn_output|"
    r"mlp\.W[io]|mlp\.(gate|up|down)_proj|ff\.layer_[12]|DenseReluDense\.w\w+)"
)

# values of `GlueConfig.target_modules` that stand for a pattern
TARGETS = {"attention": ATTENTION, "values": VALUES, "mlp": MLP}

# name to fields of `GlueConfig`; what docs/results.md says about them is why they are here
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "coefficients": {"core": "diag", "rank": "full"},
    "band": {"core": "band", "rank": "full"},
    # as many parameters on BERT and its kin, at a step near the frozen floor's
    "values": {"core": "band", "rank": "full", "half_width": 4, "target_modules": "values"},
    "dense": {"core": "dense", "rank": 32},
}
