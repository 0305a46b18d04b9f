"""Fingerprints of base weights: what ties a basis or an adapter to the model it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

PART = 1 << 20  # bytes hashed at a time


def tensor_fingerprint(weight: Tensor) -> str:
    """SHA-256 over dtype, shape and the raw bytes of one weight, as 64 hex digits.

    The bytes are those of the row-major [out, in] layout in the weight's own dtype, so a model cast to
    another dtype is another base: its spectrum is not the same to the last digit.
    """
    if type(weight.data) is not Tensor and hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()  # a quantised weight is what it is made of
        return tensors_fingerprint({n: getattr(weight, n) for n in names})
    if (state := getattr(weight, "quant_state", None)) is not None:  # bitsandbytes' scales
        return tensors_fingerprint({"": weight.data, **state.as_dict(packed=True)})
    t = weight.detach().contiguous().cpu()
    h = hashlib.sha256(f"{t.dtype}{tuple(t.shape)}".encode())
    for part in t.reshape(-1).view(torch.uint8).split(PART):
        h.update(
            part.clone().numpy().data
        )  # a copy: numpy() fixes a storage's size, which FSDP2 changes
    return h.hexdigest()


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """One fingerprint of named tensors."""
    return combined_fingerprint({name: tensor_fingerprint(t) for name, t in tensors.items()})


def combined_fingerprint(fingerprints: dict[str, str]) -> str:
    """One fingerprint of many named ones, independent of their order."""
    h = hashlib.sha256()
    for name in sorted(fingerprints):
        h.update(f"{name}={fingerprints[name]}\n".encode())
    return h.hexdigest()
