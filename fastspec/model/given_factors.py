"""Factors that a basis file gives in place of computed ones, for float weights and for quantised ones."""

from __future__ import annotations

import os

from torch import nn

from fastspec.config import SpectralConfig
from fastspec.model.targets import Target
from fastspec.nn.quantized import dequantised
from fastspec.svd.basis_file import Basis, BasisEntry, load_basis, quantisation_misfit
from fastspec.svd.factors import Factors


def factors_from_file(
    targets: list[Target], config: SpectralConfig, path: str | os.PathLike[str]
) -> list[Factors]:
    if config.basis != "svd":
        raise ValueError(f"a basis file holds singular vectors, but config.basis={config.basis!r}")
    basis = load_basis(path)
    out = []
    for t in targets:
        entry = _of_quantised(t, basis, path) if t.quantised else _of_float(t, basis, path)
        start, stop = t.directions.triplets(min(t.shape))
        if stop > len(entry.s):
            raise ValueError(
                f"{t.name}: {path} holds {len(entry.s)} triplets and triplets {start} to {stop} are "
                "asked for; make it again with a higher --rank"
            )
        out.append(
            Factors(
                entry.u[:, start:stop].to(t.matrix.device, t.dtype).contiguous(),
                entry.s[start:stop].to(t.matrix.device).contiguous(),
                entry.vh[start:stop].to(t.matrix.device, t.dtype).contiguous(),
                singular=not t.quantised and entry.u.dtype == t.dtype,
            )
        )
    return out


def _of_float(t: Target, basis: Basis, path: str | os.PathLike[str]) -> BasisEntry:
    """The file's triplets of this very weight, whatever its name there."""
    entry = basis.find(t.module.weight)  # type: ignore[arg-type]
    if entry is None:
        raise ValueError(
            f"{t.name}: {path} holds no factors of this weight: it was made from other weights, "
            "another dtype, or without this layer; make it again with `fastspec factorize`"
        )
    return entry if isinstance(t.module, nn.Linear) else entry.transposed()


def _of_quantised(t: Target, basis: Basis, path: str | os.PathLike[str]) -> BasisEntry:
    """The file's triplets of the weight of that name, compared with its quantised values."""
    around = (
        f".{t.name}".endswith(f".{name}") or f".{name}".endswith(f".{t.name}") for name in basis
    )
    names = [name for name, fits in zip(basis, around, strict=True) if fits]
    names = [name for name in names if name == t.name] or names
    if len(names) != 1:
        found = "no factors" if not names else f"factors of {len(names)} weights"
        raise ValueError(
            f"{t.name}: its weight is quantised, and {path} holds {found} of that name: make it of the "
            "model's float checkpoint with `fastspec factorize`"
        )
    weight, entry = dequantised(t.module.weight), basis[names[0]]
    off = quantisation_misfit(weight, entry)
    if off is None:
        return entry
    if quantisation_misfit(weight, entry.transposed()) is None:  # stored [in, out], as GPT-2's
        return entry.transposed()
    raise ValueError(
        f"{t.name}: {path} holds factors of other weights than those quantised here: {off}; make it of "
        "this model's float checkpoint with `fastspec factorize`"
    )
