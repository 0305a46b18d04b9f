"""Custom models with layers of many kinds, and configs for them, for the tests of the PEFT bridge."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

G = torch.Generator().manual_seed(5)
FLOATS, TOKENS, IMAGES = (
    torch.randn(6, 10, generator=G),
    torch.randint(0, 20, (6, 5), generator=G),
    torch.randn(6, 3, 8, 8, generator=G),
)


class Model(nn.Module):
    """Layers in a row, `x` being what they take."""

    def __init__(self, x: Tensor, **parts: nn.Module) -> None:
        super().__init__()
        self.x = x
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        for part in self._modules.values():
            x = part(x)
        return x


def mlp() -> Model:
    parts = {"lin0": nn.Linear(10, 20), "relu": nn.ReLU(), "drop": nn.Dropout(0.5)}
    return Model(FLOATS, **parts, lin1=nn.Linear(20, 12), sm=nn.LogSoftmax(dim=-1))


def normed() -> Model:
    return Model(FLOATS, norm=nn.LayerNorm(10), lin0=nn.Linear(10, 20), lin1=nn.Linear(20, 2))


def unbiased() -> Model:
    return Model(FLOATS, lin0=nn.Linear(10, 20, bias=False), lin1=nn.Linear(20, 2))


def embedded() -> Model:
    flat = nn.Flatten()
    return Model(
        TOKENS, emb=nn.Embedding(20, 6), conv1d=Conv1D(8, 6), flat=flat, lin0=nn.Linear(40, 2)
    )


def convolved() -> Model:
    parts = {"conv2d": nn.Conv2d(3, 4, 3), "relu": nn.ReLU(), "flat": nn.Flatten()}
    return Model(IMAGES, **parts, lin0=nn.Linear(144, 2))


def convolved1d() -> Model:
    conv = nn.Conv1d(1, 1, 2)
    return Model(FLOATS[:, None], conv1d=conv, lin0=nn.Linear(9, 10), lin1=nn.Linear(10, 3))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = FLOATS
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


def attending() -> Attending:
    return Attending()


def deep() -> Model:
    blocks = [nn.Sequential(nn.Linear(10, 10), nn.ReLU()) for _ in range(3)]
    return Model(FLOATS, layers=nn.Sequential(*blocks), lin1=nn.Linear(10, 3))


CASES = {
    "one by expression": (mlp, {"target_modules": "lin0"}),
    "one by list": (mlp, {"target_modules": ["lin1"]}),
    "two": (mlp, {"target_modules": ["lin0", "lin1"]}),
    "all": (mlp, {"target_modules": "all-linear"}),
    "all but one": (mlp, {"target_modules": "all-linear", "exclude_modules": ["lin1"]}),
    "band": (mlp, {"target_modules": ["lin0", "lin1"], "core": "band"}),
    "dense": (mlp, {"target_modules": ["lin0", "lin1"], "core": "dense"}),
    "trailing": (mlp, {"target_modules": ["lin0", "lin1"], "select": "trailing"}),
    "random": (mlp, {"target_modules": ["lin0", "lin1"], "basis": "random"}),
    "saved beside": (mlp, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "saved of two": (mlp, {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    "norm saved": (normed, {"target_modules": ["lin0"], "modules_to_save": ["norm", "lin1"]}),
    "without bias": (unbiased, {"target_modules": ["lin0", "lin1"]}),
    "Conv1D": (embedded, {"target_modules": ["conv1d"]}),
    "Conv1D and linear": (embedded, {"target_modules": "all-linear"}),
    "Conv1D, head saved": (embedded, {"target_modules": ["conv1d"], "modules_to_save": ["lin0"]}),
    "Conv1D, embedding saved": (
        embedded,
        {"target_modules": ["conv1d"], "modules_to_save": ["emb"]},
    ),
    "beside conv2d": (convolved, {"target_modules": "all-linear"}),
    "conv2d saved": (convolved, {"target_modules": ["lin0"], "modules_to_save": ["conv2d"]}),
    "beside conv1d": (convolved1d, {"target_modules": ["lin0", "lin1"]}),
    "beside attention": (attending, {"target_modules": "all-linear"}),
    "some layers": (deep, {"target_modules": ["0"], "layers_to_transform": [0, 2]}),
}
