"""Reading two checkpoints and pairing their matrices."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastspec.files import weight_files
from fastspec.svd.cli import EXCLUDE

_ATTENTION = re.compile(
    r"attn|attention|in_proj|query|key|value|(^|\.)[qkvo](_proj|_lin)?\.weight$"
)
_MLP = re.compile(
    r"mlp|ffn|feed_forward|intermediate|output\.dense|(^|\.)(fc|lin|linear|wi|wo)_?\d*\.|"
    r"(up|down|gate)_proj|c_fc"
)
# the first part of a name that is a number, or ends in one after a word for a layer: layer.3, layer4.0,
# encoder_layer_5.mlp.0
_LAYER = re.compile(r"(?:^|\.)(?:[a-z_]*(?:layer|block|stage)_?)?(\d+)(?:\.|$)")
_WRAPPERS = re.compile(r"^((module|_orig_mod|base_model\.model)\.)+")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One matrix of two checkpoints, both [m, n] in float32 (float64 stays).

    Args:
        name: of the tensor, without wrappers' prefixes.
        kind: "attention", "mlp" or "other", by the name.
        layer: number of the layer, by the name; None without one.
        before, after: the matrix in the first and in the second checkpoint.
    """

    name: str
    kind: str
    layer: int | None
    before: Tensor
    after: Tensor


def load_weights(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name.

    Args:
        source: a state dict; a file of safetensors or of `torch.save` (read with weights_only=True);
            a folder with *.safetensors, or else *.bin, *.pt or *.pth; or the folder of a finished run of
            `fastspec glue`, whose adapter is merged.

    Raises:
        ValueError: nothing readable is there.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if (path / "result.json").exists():
        from fastspec.studies.glue.build import effective_weights, finished

        return effective_weights(finished(path).model)
    files = [path] if path.is_file() else weight_files(path)
    if not files:
        files = sorted(f for suffix in ("bin", "pt", "pth") for f in path.glob(f"*.{suffix}"))
    if not files:
        raise ValueError(
            f"{path}: no such file, or a folder without weights; expected *.safetensors, *.bin, *.pt or "
            "*.pth, or a finished run of `fastspec glue`"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_read(file))
    return tensors


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as e:
            raise ValueError(f"{file} is not a readable safetensors file: {e}") from None
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"{file} holds no state dict")
    return {k: v for k, v in loaded.items() if isinstance(v, Tensor)}


def pairs(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    include: str = "",
    exclude: str = EXCLUDE,
) -> list[Pair]:
    """The matrices that both checkpoints have, in the order of the first.

    Tensors of more than two dimensions (kernels of convolutions) are seen as [first, product of the
    others]. Names are compared without wrappers' prefixes, and if that finds nothing, without their
    first part, so that an encoder fits a classifier on top of it.

    Args:
        before, after: tensors by name.
        include, exclude: regular expressions; a matrix is taken if the first is found in its name and
            the second is not. The default leaves embeddings and heads out.

    Raises:
        ValueError: nothing is left, or a matrix has two shapes or values that are not finite.
    """
    names = _common(_plain(before), _plain(after))
    out = []
    for name, (a, b) in names.items():
        if a.dim() < 2 or min(a.shape[0], a[0].numel()) < 2 or not a.is_floating_point():
            continue
        if not re.search(include, name) or (exclude and re.search(exclude, name)):
            continue
        if a.shape != b.shape:
            raise ValueError(f"{name}: shape {list(a.shape)} in one, {list(b.shape)} in the other")
        matrices = [t.detach().cpu().flatten(1) for t in (a, b)]
        matrices = [t if t.dtype == torch.float64 else t.float() for t in matrices]
        if not all(bool(torch.isfinite(t).all()) for t in matrices):
            raise ValueError(f"{name} holds NaN or infinity")
        out.append(Pair(name, kind_of(name), layer_of(name), *matrices))
    if not out:
        raise ValueError(
            "the checkpoints have no matrix in common that the patterns leave; names in one: "
            f"{_some(before)}; in the other: {_some(after)}"
        )
    return out


def kind_of(name: str) -> str:
    """ "attention", "mlp" or "other", by the usual names of such layers."""
    if _ATTENTION.search(name):
        return "attention"
    return "mlp" if _MLP.search(name) else "other"


def layer_of(name: str) -> int | None:
    """The first number in a name that counts layers; None without one."""
    number = _LAYER.search(name)
    return int(number[1]) if number else None


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_WRAPPERS.sub("", name): t for name, t in tensors.items()}


def _common(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    def stem(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.partition(".")[2] or name: t for name, t in tensors.items()}

    for x, y in ((a, b), (stem(a), b), (a, stem(b))):
        # one common bias or embedding by chance is no match
        if sum(x[n].dim() > 1 for n in x.keys() & y.keys()) > 0:
            return {name: (t, y[name]) for name, t in x.items() if name in y}
    return {}


def _some(tensors: Mapping[str, Tensor]) -> str:
    names = list(tensors)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
