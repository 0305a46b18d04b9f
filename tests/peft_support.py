"""Small models for the PEFT bridge, and helpers its tests share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fastspec.peft import SpectralConfig
from fastspec.peft.layer import SpectralLinear

PREFIX = "base_model.model."
CORES = [{"core": "diag"}, {"core": "band", "half_width": 2}, {"core": "dense"}]


class Mlp(nn.Module):
    """Two layers and a head, the custom model of PEFT's own tests."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(self.lin0(x).relu()).relu())


def mlp(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp().eval()


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=50,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


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
    return [m for m in model.modules() if isinstance(m, SpectralLinear)]
