"""Basis files: the leading singular triplets of a model's weights, so that nobody computes them twice.

A safetensors file with the tensors `<module>.u [m, k]`, `<module>.s [k]` and `<module>.vh [k, n]` of
every stored weight [m, n], and one metadata entry, `fastspec`: JSON with the format number and per
module the fingerprint of the stored tensor, its shape, the certified residual, and the digest of all
these (format 2; files of format 1 have none). A basis belongs to a weight by that fingerprint and not by
its name, since one checkpoint serves model classes that name their layers differently. Beside the weight
its triplets are measured once more, so that no factors of another weight are taken for its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastspec.files import excerpt
from fastspec.fingerprint import combined_fingerprint, tensor_fingerprint
from fastspec.precision import full_precision
from fastspec.svd.scaling import exponents, times_power
from fastspec.svd.triplets import residual

FORMAT = 2
_READS = (1, 2)
QUANTISED = 0.3  # of s_1: by how much rounding to 4 bits may move W v
_AGAIN = "make the file again with fastspec factorize"


class BasisError(ValueError):
    """A basis file can't be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class BasisEntry:
    """Triplets of one stored weight [m, n], largest first.

    Attributes:
        u, s, vh: [m, k], [k], [k, n].
        fingerprint: `fastspec.fingerprint.tensor_fingerprint` of the stored weight.
        residual: certified relative residual (see `fastspec.TopkSVD`); where the file's dtype is narrower
            than float32, of the factors before that rounding.
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

    def __init__(self, entries: Mapping[str, BasisEntry], source: str = "the basis") -> None:
        self._entries = dict(entries)
        self._source = source
        self._by_fingerprint = {e.fingerprint: name for name, e in self._entries.items()}

    def __getitem__(self, name: str) -> BasisEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, weight: Tensor) -> BasisEntry | None:
        """The entry made from exactly this stored weight (dtype, shape and every byte), or None.

        Raises:
            BasisError: the entry names this weight, but its triplets are not those of the weight.
        """
        name = self._by_fingerprint.get(tensor_fingerprint(weight))
        if name is None:
            return None
        entry = self._entries[name]
        if reason := misfit(weight, entry):
            raise BasisError(
                f"{self._source}: {name} names this weight and holds no singular triplets of it: {reason}; "
                f"{_AGAIN}"
            )
        return entry


def load_basis(path: str | os.PathLike[str]) -> Basis:
    """Read a basis file written by `fastspec factorize`.

    Raises:
        BasisError: not a basis file, no regular file (a link to one is), truncated, of an unknown format,
            damaged (a digest does not fit, or values are not finite), or its tensors are not those of the
            weights it names.
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
            if header.get("format") not in _READS:
                raise BasisError(
                    f"{path} has basis format {excerpt(header.get('format'))}, this fastspec reads "
                    f"{' and '.join(map(str, _READS))}"
                )
            named = {f"{name}.{key}" for name in header["weights"] for key in ("u", "s", "vh")}
            if odd := sorted(named.symmetric_difference(f.keys())):
                raise BasisError(
                    f"{path} is damaged: its metadata and its tensors name different weights, as "
                    f"{excerpt(odd[0])}; {_AGAIN}"
                )
            digested = header["format"] > 1
            entries = {}
            for name, about in header["weights"].items():
                tensors = check_entry(f, f"{name}.", about, f"{path}: {name[:200]}", digested)
                entries[name] = BasisEntry(
                    **tensors, fingerprint=about["fingerprint"], residual=about["residual"]
                )
    except (SafetensorError, ValueError, RecursionError) as e:
        if isinstance(e, BasisError):
            raise
        raise BasisError(f"{path} is not a readable basis file: {excerpt(e)}") from None
    return Basis(entries, os.fspath(path))


def entry_digest(fingerprint: str, residual: float, tensors: Mapping[str, Tensor]) -> str:
    """One digest, 64 hex digits, of the factors of a weight and of what is said of them."""
    factors = {key: tensor_fingerprint(t) for key, t in tensors.items()}
    return combined_fingerprint({**factors, "weight": fingerprint, "residual": repr(residual)})


def check_entry(f: Any, prefix: str, about: Any, label: str, digested: bool) -> dict[str, Tensor]:
    """u [m, k], s [k] and vh [k, n] of one weight from the open file, whose metadata says `about` it.

    Raises:
        BasisError: they are not whole, or not what the metadata says.
    """
    if not isinstance(about, dict) or not (
        isinstance(about.get("fingerprint"), str)
        and isinstance(about.get("residual"), float | int)
        and about["residual"] >= 0  # which NaN is not
        and isinstance(about.get("shape"), list)
        and len(about["shape"]) == 2
        and all(type(n) is int for n in about["shape"])
    ):
        raise BasisError(
            f"{label} must have a fingerprint, a residual and a shape [m, n] in the metadata, got "
            f"{excerpt(about)}; {_AGAIN}"
        )
    m, n = about["shape"]
    tensors = {key: f.get_tensor(f"{prefix}{key}") for key in ("u", "s", "vh")}
    k = tensors["s"].numel()
    for key, shape in {"u": (m, k), "s": (k,), "vh": (k, n)}.items():
        if tensors[key].shape != shape:
            raise BasisError(
                f"{label}.{key} must have shape {shape} for a weight {(m, n)} and {k} singular values, "
                f"got {tuple(tensors[key].shape)}; {_AGAIN}"
            )
    for key, t in tensors.items():
        if not t.is_floating_point() or not bool(torch.isfinite(t).all()):
            raise BasisError(
                f"{label}.{key} must hold finite floating-point numbers, got NaN, infinity or {t.dtype}: the "
                f"file is damaged; {_AGAIN}"
            )
    if digested:
        digest = entry_digest(about["fingerprint"], about["residual"], tensors)
        if about.get("digest") != digest:
            raise BasisError(
                f"{label} is damaged: the digest of its factors and metadata is {digest}, the file says "
                f"{excerpt(about.get('digest'))}; {_AGAIN}"
            )
    return tensors


def quantisation_misfit(weight: Tensor, entry: BasisEntry) -> str | None:
    """Why the triplets are not those of a matrix that was rounded to `weight`; None where they may be.

    Four bits move W v by up to a tenth of s_1, where another matrix moves it by about s_1.
    """
    if weight.shape != (len(entry.u), entry.vh.shape[1]):
        shape = [len(entry.u), entry.vh.shape[1]]
        return f"they are of a matrix {shape}, and the weight is {list(weight.shape)}"
    w, s, u, v = (
        t.to(weight.device).float()[None] for t in (weight, entry.s, entry.u, entry.vh.mT)
    )
    with torch.no_grad(), full_precision(w.device.type):
        error = float(residual(w, u, s, v, floor=1.0)[0])
    if not error <= QUANTISED:
        return f"|W v - s u| is {error:.1e} s_1, and rounding leaves at most {QUANTISED:g} s_1"
    return None


def misfit(weight: Tensor, entry: BasisEntry) -> str | None:
    """Why the triplets are not those of the weight to what their dtype allows; None where they are."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    w = weight.detach().to(compute)[None]
    s = entry.s.to(w)[None]
    with torch.no_grad(), full_precision(w.device.type):
        exponent = exponents(w, compute, ["the weight"])
        if exponent is not None:
            w, s = times_power(w, -exponent), times_power(s, -exponent)
        u, v = entry.u.to(w)[None], entry.vh.mT.to(w)[None]
        error = float(residual(w, u, s, v, floor=1.0)[0])  # in parts of s_1
        eye = torch.eye(s.shape[1], dtype=compute, device=w.device)
        skew = max(float((q.mT @ q - eye).abs().max()) for q in (u, v))
    # rounding every entry by eps / 2 moves W v, and s u, by no more than that part of s_1
    stored = torch.finfo(entry.u.dtype).eps
    allowed = entry.residual + 2 * stored + 64 * torch.finfo(compute).eps
    if not error <= allowed:
        return f"|W v - s u| is {error:.1e} s_1 where at most {allowed:.1e} s_1 is expected"
    allowed = 1e-4 + 4 * stored
    if not skew <= allowed:
        return f"its vectors are orthonormal to {skew:.1e} where at most {allowed:.1e} is expected"
    return None
