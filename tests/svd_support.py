"""What the tests of `topk_svd` share: both implementations, spectra, and the residual by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastspec import _extension
from fastspec.svd.options import residual_floor
from fastspec.svd.topk import TopkSVD


@pytest.fixture(autouse=True, params=["aten", "extension"])
def implementation(request, monkeypatch) -> str:
    """Every test runs on the Python path and on the compiled one."""
    if request.param == "aten":
        monkeypatch.setattr(_extension, "load", lambda *_, **__: "hidden by the test")
    elif _extension.load() is not None:
        pytest.skip(str(_extension.load()))
    return request.param


def with_spectrum(m: int, n: int, s: Tensor, seed: int = 0, dtype=torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    r = len(s)
    u = torch.linalg.qr(torch.randn(m, r, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, r, generator=g, dtype=torch.float64))[0]
    return ((u * s.double()) @ v.mT).to(dtype)


def slow_decay(r: int) -> Tensor:
    return (1 + torch.arange(r, dtype=torch.float64) / 30) ** -0.7


def worst_residual(w: Tensor, found: TopkSVD) -> float:
    """The docstring's definition, in float64 and straight from the returned tensors."""
    narrowest = found.s.dtype if found.vh.dtype == torch.float64 else torch.float32
    # by powers of two, so that float64 holds every square of both
    power = 1 - math.frexp(float(w.abs().max()))[1]
    w, s = (ldexp(t.double(), power) for t in (w, found.s))
    u, vh = found.u.double(), found.vh.double()
    forward = (w @ vh.mT - u * s).norm(dim=0)
    backward = (w.mT @ u - vh.mT * s).norm(dim=0)
    allowed = torch.maximum(s, residual_floor(narrowest) * s[0])
    if s[0] == 0:
        return float(torch.maximum(forward, backward).max())
    return float((torch.maximum(forward, backward) / allowed).max())


def ldexp(t: Tensor, power: int) -> Tensor:
    """t * 2^power, where 2^power itself may be beyond the range."""
    half = power // 2
    return t * 2.0**half * 2.0 ** (power - half)
