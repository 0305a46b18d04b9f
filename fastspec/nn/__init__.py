"""One layer: the drop-ins for `nn.Linear` and, in `fastspec.nn.conv1d`, for transformers' `Conv1D`."""

from fastspec.nn.layer import SpectralLayer
from fastspec.nn.linear import SpectralLinear

__all__ = ["SpectralLayer", "SpectralLinear"]
