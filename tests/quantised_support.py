"""Number formats of quantised bases, and plain models over them as other libraries make them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

quantization = pytest.importorskip("torchao.quantization", reason="needs the extra quant")

from torchao.quantization.granularity import PerGroup  # noqa: E402

CONFIGS = {
    "int8": quantization.Int8WeightOnlyConfig(),
    "int4": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
}
OTHER = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8))
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
CASES = [
    *(pytest.param(config, id=name) for name, config in CONFIGS.items()),
    *(pytest.param(name, id=name, marks=needs_bitsandbytes) for name in ("nf4", "fp4")),
]


def dequantised(weight):
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def quantised_plain(net, config):
    """The plain model over the same base, by the other library alone."""
    if not isinstance(config, str):
        quantization.quantize_(net.blocks, config)
        return net
    from bitsandbytes.nn import Linear4bit

    for block in net.blocks:
        for name, child in list(block.named_children()):
            if type(child) is torch.nn.Linear:
                shape = (child.in_features, child.out_features, child.bias is not None)
                layer = Linear4bit(*shape, quant_type=config)
                layer.load_state_dict(child.state_dict())
                setattr(block, name, layer.to(child.weight.device))
    return net
