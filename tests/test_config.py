"""`SpectralConfig` refuses what makes no sense, and survives JSON."""

import json

import numpy as np
import pytest
import torch

from fastspec import SpectralConfig
from fastspec.config import resolve_rank


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 1.5}, ValueError, r"rank as a fraction must lie in \(0, 1\]"),
        ({"rank": "all"}, TypeError, "rank must be an int, a float or 'full', got 'all'"),
        ({"rank": True}, TypeError, "rank must be"),
        ({"rank": {"up": -1}}, ValueError, r"rank\['up'\] must be at least 1"),
        ({"rank": {"(": 1}}, ValueError, "not a regular expression"),
        ({"core": "full"}, ValueError, "core must be one of 'diag', 'band', 'dense'"),
        ({"basis": "qr"}, ValueError, "basis must be one of"),
        ({"path": "slow"}, ValueError, "path must be one of"),
        ({"half_width": 0}, ValueError, "half_width must be an integer >= 1"),
        ({"select": "middle"}, ValueError, "select must be"),
        ({"select": (4, 4)}, ValueError, "0 <= start < stop"),
        ({"target_modules": "("}, ValueError, "target_modules: .*not a regular expression"),
        ({"tol": 0.0}, ValueError, "tol must lie in"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        SpectralConfig(**options)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numbers_of_numpy_are_pythons_own(kind):
    options = {"rank": kind(4), "half_width": kind(2), "seed": kind(3), "core": "band"}
    config = SpectralConfig(**options, tol=np.float32(1e-4))
    assert config == SpectralConfig(
        rank=4, half_width=2, seed=3, core="band", tol=float(np.float32(1e-4))
    )
    assert SpectralConfig(**json.loads(json.dumps(config.to_dict()))) == config
    for config in (
        SpectralConfig(rank={"up": kind(2), "default": np.float32(0.5)}),
        SpectralConfig(select=(kind(0), kind(3))),
    ):
        assert SpectralConfig(**json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        SpectralConfig(rank=kind(0))
    with pytest.raises(TypeError, match="rank must be"):
        SpectralConfig(rank=np.bool_(True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": {"up": "full", "default": 0.5}, "core": "band", "half_width": 3},
        {
            "select": (2, 9),
            "target_modules": ["up"],
            "modules_to_save": ["head"],
            "exclude_modules": "x.*",
        },
    ],
)
def test_json_round_trip(options):
    config = SpectralConfig(**options)
    assert SpectralConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_resolve_rank():
    assert resolve_rank("full", 384) == 384
    assert resolve_rank(0.5, 384) == 192
    assert resolve_rank(0.001, 384) == 1
    assert resolve_rank(32, 384) == 32


@pytest.mark.parametrize("kind", [np.int64, np.int32])
def test_a_layer_and_an_svd_take_numbers_of_numpy(tmp_path, kind):
    from tiny_models import net

    from fastspec import SpectralLinear, save_adapter, spectralize, topk_svd

    weights = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    assert topk_svd(weights, kind(3)).s.shape == (2, 3)
    assert [len(one.s) for one in topk_svd([*weights], [kind(1), kind(2)])] == [1, 2]
    assert SpectralLinear.from_linear(torch.nn.Linear(6, 8), rank=kind(2)).rank == 2
    save_adapter(spectralize(net(), SpectralConfig(rank={"up": kind(2), "default": 3})), tmp_path)
