"""The tiny models of the tests, their weights drawn from a seed, in eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastspec

IDS = torch.arange(22).reshape(2, 11) % 11  # for `Net`


class Block(nn.Module):
    """x + down(relu(norm(up(x))))."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.up, self.norm, self.down = (
            nn.Linear(d, 4 * d),
            nn.LayerNorm(4 * d),
            nn.Linear(4 * d, d),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)).relu())


class Net(nn.Module):
    """An embedding of 11 tokens, two blocks and a head: what nothing but torch is needed for."""

    def __init__(self, d: int = 16, labels: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, d)
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.head = nn.Linear(d, labels)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Mlp(nn.Module):
    """Two layers and a head, the custom model of PEFT's own tests."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(self.lin0(x).relu()).relu())


class Late(nn.Module):
    """Its buffer is None until its first call in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale = x.detach().abs().mean(0)
        return x if self.scale is None else x / (1 + self.scale)


def net(seed: int = 0, **sizes: int) -> Net:
    torch.manual_seed(seed)
    return Net(**sizes).eval()


def mlp(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp().eval()


def trained(
    config: fastspec.SpectralConfig | None = None, seed: int = 0, scale: float = 1.0, **sizes: int
) -> Net:
    """An adapted `Net` whose trained parameters are random."""
    model = fastspec.spectralize(net(**sizes), config or fastspec.SpectralConfig(rank=4))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(scale * torch.randn(p.shape, generator=g))
    return model


SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 16}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def bert(seed: int = 0, task: str = "ForSequenceClassification", **fields: Any) -> nn.Module:
    """BERT with dropout in train mode; `fields` are those of its configuration that differ."""
    return _build("Bert", task, seed, BERT | fields)


def roberta(seed: int = 0, **fields: Any) -> nn.Module:
    """Its head is two layers."""
    return _build("Roberta", "ForSequenceClassification", seed, BERT | {"pad_token_id": 0} | fields)


def gpt2(seed: int = 0, task: str = "LMHeadModel", **fields: Any) -> nn.Module:
    tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return _build("GPT2", task, seed, GPT2 | tokens | fields)


def llama(seed: int = 0, **fields: Any) -> nn.Module:
    return _build("Llama", "ForCausalLM", seed, BERT | {"num_key_value_heads": 1} | fields)


def t5(seed: int = 0, **fields: Any) -> nn.Module:
    tokens = {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return _build("T5", "ForConditionalGeneration", seed, T5 | tokens | fields)


# dropout off in train mode too
NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
}


def _build(family: str, task: str, seed: int, fields: dict[str, Any]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**fields)
    torch.manual_seed(seed)
    return getattr(transformers, family + task)(config).eval()
