"""The parts of `pack.sh` that need Python: MiniLM in bfloat16, and the pure packages to compare with."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastspec.studies.encoders import default_model
from gpu.build import STAMP, fingerprint

PACKAGES = ("eigentune",)
WEIGHTS = "model.safetensors"
BESIDE = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def pack_model(into: Path) -> None:
    source = Path(default_model())
    into.mkdir()
    tensors = load_file(source / WEIGHTS)
    halved = {name: t.bfloat16() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(
        {name: t.contiguous() for name, t in halved.items()}, into / WEIGHTS, {"format": "pt"}
    )
    for name in BESIDE:
        shutil.copy2(source / name, into / name)
    before = sum(t.nbytes for t in tensors.values())
    print(f"{into}: {before >> 20} MiB of {torch.float32} in half as many bytes")


def pack_package(name: str, into: Path) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed"
    (place,) = spec.submodule_search_locations or ()
    shutil.copytree(place, into / name, ignore=shutil.ignore_patterns("__pycache__"))
    for about in Path(place).parent.glob(f"{name}-*.dist-info"):  # its version and licence
        shutil.copytree(about, into / about.name)


def main(into: Path) -> None:
    (into / "ext" / STAMP).write_text(fingerprint())
    pack_model(into / "minilm")
    for name in PACKAGES:
        pack_package(name, into / "site")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
