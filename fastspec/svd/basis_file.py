"""Basis files: the leading singular triplets of a model's weights, so that nobody computes them twice.

A safetensors file with the tensors `<module>.u [m, k]`, `<module>.s [k]` and `<module>.vh [k, n]` of
every stored weight [m, n], and one metadata entry, `fastspec`: JSON with the format number and per
module the fingerprint of the stored tensor, its shape, and the certified residual. A basis belongs to
a weight by that fingerprint and not by its name, since one checkpoint serves model classes that name
their layers differently.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastspec.files import excerpt
from fastspec.fingerprint import tensor_fingerprint

FORMAT = 1


class BasisError(ValueError):
    """A basis file can't be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class BasisEntry:
    """Triplets of one stored weight [m, n], largest first.

    Attributes:
        u, s, vh: [m, k], [k], [k, n].
        fingerprint: `fastspec.fingerprint.tensor_fingerprint` of the stored weight.
        residual: certified relative residual (see `fastspec.TopkSVD`), of the factors before they were
            rounded to the file's dtype.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    fingerprint: str
    residual: float

    def transposed(self) -> BasisEntry:
        """The triplets of the transposed weight: for layers that store [in, out], GPT-2's Conv1D."""
        return dataclasses.replace(self, u=self.vh.mT.contiguous(), vh=self.u.mT.contiguous())


class Basis(Mapping[str, BasisEntry]):
    """Module name to `BasisEntry`; `find` looks a weight up by its content."""

    def __init__(self, entries: Mapping[str, BasisEntry]) -> None:
        self._entries = dict(entries)
        self._by_fingerprint = {e.fingerprint: e for e in self._entries.values()}

    def __getitem__(self, name: str) -> BasisEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, weight: Tensor) -> BasisEntry | None:
        """The entry made from exactly this stored weight (dtype, shape and every byte), or None."""
        return self._by_fingerprint.get(tensor_fingerprint(weight))


def load_basis(path: str | os.PathLike[str]) -> Basis:
    """Read a basis file written by `fastspec factorize`.

    Raises:
        BasisError: not a basis file, no regular file (a link to one is), truncated, of an unknown format, or
            its tensors are not those of the weights it names.
        OSError: the file cannot be read.
    """
    try:
        kind = os.stat(path).st_mode
    except ValueError as e:  # a null byte
        raise BasisError(f"{excerpt(str(path))} can't be the name of a file: {e}") from None
    if not stat.S_ISREG(kind):  # to open a pipe would wait for a writer
        raise BasisError(f"{path} is not a regular file; expected one of fastspec factorize")
    try:
        with safe_open(os.fspath(path), framework="pt") as f:
            header = json.loads((f.metadata() or {}).get("fastspec", "null"))
            if not isinstance(header, dict) or not isinstance(header.get("weights"), dict):
                raise BasisError(f"{path} is not a basis file: it has no fastspec metadata")
            if header.get("format") != FORMAT:
                raise BasisError(
                    f"{path} has basis format {excerpt(header.get('format'))}, this fastspec reads {FORMAT}"
                )
            entries = {
                name: _entry(f, name, about, f"{path}: {name[:200]}")
                for name, about in header["weights"].items()
            }
    except (SafetensorError, ValueError, RecursionError) as e:
        if isinstance(e, BasisError):
            raise
        raise BasisError(f"{path} is not a readable basis file: {excerpt(e)}") from None
    return Basis(entries)


def _entry(f: Any, name: str, about: Any, label: str) -> BasisEntry:
    """One weight of the open file, whose metadata says `about` it."""
    if not isinstance(about, dict) or not (
        isinstance(about.get("fingerprint"), str)
        and isinstance(about.get("residual"), (int, float))
        and isinstance(about.get("shape"), list)
        and len(about["shape"]) == 2
        and all(type(n) is int for n in about["shape"])
    ):
        raise BasisError(
            f"{label} must have a fingerprint, a residual and a shape [m, n] in the metadata, got "
            f"{excerpt(about)}; make the file again with fastspec factorize"
        )
    m, n = about["shape"]
    tensors = {key: f.get_tensor(f"{name}.{key}") for key in ("u", "s", "vh")}
    k = tensors["s"].numel()
    for key, shape in {"u": (m, k), "s": (k,), "vh": (k, n)}.items():
        if tensors[key].shape != shape:
            raise BasisError(
                f"{label}.{key} must have shape {shape} for a weight {(m, n)} and {k} singular values, "
                f"got {tuple(tensors[key].shape)}; make the file again with fastspec factorize"
            )
    return BasisEntry(**tensors, fingerprint=about["fingerprint"], residual=about["residual"])
