"""What the tests of the PEFT bridge share: its cases, their inputs and configurations."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

pytest.importorskip("peft")

from peft import get_peft_model
from tiny_models import bert, gpt2, mlp
from torch import Tensor, nn

from fastspec.peft import SpectralConfig
from fastspec.peft.layer import SpectralLinear

PREFIX = "base_model.model."
CORES = [
    {"core": "diag"},
    {"core": "band", "half_width": 2},
    {"core": "dense"},
    {"core": "low_rank", "core_rank": 2},
]


X = torch.randn(8, 10, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(1, 50, (6, 7), generator=torch.Generator().manual_seed(2))


def output(model: nn.Module, **kwargs) -> Tensor:
    """The model's output on the inputs above, whichever of the models it is."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", "custom") == "custom":
        return model(X, **kwargs)
    return model(input_ids=IDS, **kwargs).logits


def mlp_config(**options) -> SpectralConfig:
    options = {"target_modules": ["lin0", "lin1"], "modules_to_save": ["head"]} | options
    return SpectralConfig(**({"r": 4} | options))


# model, config options: what every general behaviour is tested with
CASES = {
    "mlp": (mlp, {"target_modules": ["lin0", "lin1"], "modules_to_save": ["head"]}),
    "bert": (bert, {"task_type": "SEQ_CLS"}),
    "gpt2": (gpt2, {"task_type": "CAUSAL_LM"}),
}


def adapted(case: str, seed: int | None = 0, **options):
    """A PEFT model of a case, its coefficients and heads shifted (seed None: as they begin)."""
    make, defaults = CASES[case]
    model = get_peft_model(make(), SpectralConfig(**({"r": 4} | defaults | options))).eval()
    if seed is not None:
        shift(model, seed)
    return model


def shift(model: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Move everything trainable by random numbers."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=g))


def layers(model: nn.Module) -> list[SpectralLinear]:
    """The adapted layers, of which there are some: a loop over none would hold nothing."""
    found = [m for m in model.modules() if isinstance(m, SpectralLinear)]
    assert found
    return found
