"""`SpectralConv1D`: the same layer for the `Conv1D` of GPT-2, whose weight is stored [in, out]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastspec.nn.layer import SpectralLayer
from fastspec.svd.factors import Directions


class SpectralConv1D(SpectralLayer, Conv1D):
    """Hugging Face's `Conv1D` (y = x W + b, weight [in, out]) with trained spectral coefficients.

    Factors and core are those of the transposed weight, as in `SpectralLinear`: u [out, k], s [k],
    vh [k, in].
    """

    _plain_class = Conv1D

    @classmethod
    def from_conv1d(cls, conv: Conv1D, rank: int = 32, **options: Any) -> SpectralConv1D:
        """Adapt a `Conv1D`; the options are those of `SpectralLinear.from_linear`."""
        names = ("select", "basis", "tol", "seed")
        chosen = {name: options.pop(name) for name in names if name in options}
        defaults: dict[str, Any] = {
            "core": "diag",
            "half_width": 1,
            "core_rank": 1,
            "path": "fast",
            "train_bias": False,
            "factors": None,
        }
        unknown = options.keys() - defaults.keys()
        if unknown:
            raise TypeError(f"unknown options {sorted(unknown)}")
        return cls.adopt(conv, directions=Directions(rank, **chosen), **defaults | options)

    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` that computes the same: the merged weight transposed, the bias copied."""
        out_features, in_features = self._matrix(self.weight).shape
        linear = nn.Linear(in_features, out_features, device="meta")
        linear.weight = nn.Parameter(self._matrix(self.effective_weight()).contiguous())
        linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        return weight.mT

    def _plain(self, x: Tensor) -> Tensor:
        return Conv1D.forward(self, x)
