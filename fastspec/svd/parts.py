"""Parts of a basis file that is being made: a small safetensors file for every finished matrix.

A part holds `u`, `s` and `vh`, and one metadata entry, `fastspec-part`: JSON of what was asked for, the
certified residual and the digest of all (`basis_file.entry_digest`). It is used again, and joined, only
where it is whole and is what is asked for now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastspec.files import excerpt, join_safetensors, write_atomically
from fastspec.svd.basis_file import FORMAT, BasisError, check_entry, entry_digest
from fastspec.svd.topk import TopkSVD

_KEY = "fastspec-part"


def part_path(parts: Path, name: str) -> Path:
    """The file of the weight of that name."""
    return parts / (hashlib.sha256(name.encode()).hexdigest()[:32] + ".safetensors")


def write_part(parts: Path, asked: Mapping[str, Any], svd: TopkSVD) -> None:
    """Keep the triplets of one weight; `asked` has its name, fingerprint, shape, rank and dtype."""
    tensors, residual = {"u": svd.u, "s": svd.s, "vh": svd.vh}, float(svd.residual)
    digest = entry_digest(asked["fingerprint"], residual, tensors)
    about = {**asked, "residual": residual, "digest": digest}
    write_atomically(part_path(parts, asked["weight"]), save(tensors, {_KEY: json.dumps(about)}))


def read_part(parts: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What the part of the weight `wanted["weight"]` says of itself.

    Raises:
        FileNotFoundError: there is none.
        BasisError: it is damaged, or is not what is wanted; the message says what differs.
    """
    path = part_path(parts, wanted["weight"])
    label = f"{path} ({wanted['weight']})"
    try:
        with safe_open(path, framework="pt") as f:
            about = json.loads((f.metadata() or {}).get(_KEY, "null"))
            if not isinstance(about, dict):
                raise BasisError(f"{label} has no {_KEY!r} metadata")
            for key, value in wanted.items():
                if about.get(key) != value:
                    raise BasisError(
                        f"{label} is of another run: {key} is {about.get(key)!r}, {value!r} is asked for"
                    )
            tensors = check_entry(f, "", about, label, digested=True)
    except (SafetensorError, ValueError, RecursionError) as e:
        if isinstance(e, BasisError):
            raise
        raise BasisError(f"{label} is not readable: {excerpt(e)}") from None
    stored = str(tensors["u"].dtype).removeprefix("torch.")
    if len(tensors["s"]) != about.get("rank") or stored != about.get("dtype"):
        raise BasisError(
            f"{label} holds {len(tensors['s'])} triplets in {stored} and says that it has "
            f"{about.get('rank')!r} in {about.get('dtype')!r}"
        )
    return about


def join_parts(
    output: Path, parts: Path, wanted: list[dict[str, Any]], about: Mapping[str, Any]
) -> None:
    """Write the basis file of all weights in `wanted`, with `about` in its header.

    Raises:
        BasisError: a part is missing, damaged or of another run.
    """
    tensors: dict[str, tuple[Path, str]] = {}
    weights: dict[str, Any] = {}
    for one in wanted:
        try:
            found = read_part(parts, one)
        except (FileNotFoundError, BasisError) as e:
            raise BasisError(
                f"{output} can't be joined: {e}; give the same command again, which makes that part anew"
            ) from None
        module, part = one["weight"].removesuffix(".weight"), part_path(parts, one["weight"])
        tensors |= {f"{module}.{key}": (part, key) for key in ("u", "s", "vh")}
        weights[module] = {k: found[k] for k in ("fingerprint", "shape", "residual", "digest")}
    header = {"format": FORMAT, **about, "weights": weights}
    join_safetensors(output, tensors, {"fastspec": json.dumps(header)})
