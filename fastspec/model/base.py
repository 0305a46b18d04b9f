"""The base of an adapter: every parameter and persistent buffer it does not hold, by one digest each.

What does not stay as it was is no base: a parameter trained by hand, the running statistics of a
BatchNorm. It belongs to the adapter (`Base.changed`).

One digest a tensor, so that a message can name the one that differs; 16 hex digits of SHA-256, since they
guard against mistakes and not against forgery, which nobody needs: a folder says what it likes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastspec.files import excerpt
from fastspec.fingerprint import tensor_fingerprint
from fastspec.model.adapter_file import AdapterError
from fastspec.model.buffers import DIGITS, check_extra_state, persistent_buffers
from fastspec.model.file_names import in_file
from fastspec.model.fsdp import FACTORS, is_sharded, whole
from fastspec.model.targets import output_layer_names, spectral_layers, unsaved_heads
from fastspec.nn.layer import SpectralLayer

TABLES = "task_tables."  # of all tasks, while they are trained together


class Base:
    """The tensors of a model as it is without its adapter, plain or adapted, and their digests.

    Attributes:
        tensors: name to tensor; tied ones under all of their names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        own = {
            f"{layer}.{leaf}" for layer, _ in spectral_layers(model) for leaf in ("delta", *FACTORS)
        }
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *persistent_buffers(model),
        ):
            if name.endswith(".base_weight"):  # of a merged layer, whose weight is no base
                self.tensors[name.removesuffix(".base_weight") + ".weight"] = tensor
            elif name not in own and not name.startswith(TABLES):
                self.tensors.setdefault(name, tensor)
        self._fingerprints: dict[tuple[int, int | None], str] = {}

    def digest(self, name: str, rows: int | None = None) -> str:
        """The digest of a tensor, or of its first rows. Of a sharded one every process asks."""
        return self._fingerprint(name, rows)[:DIGITS]

    def _fingerprint(self, name: str, rows: int | None = None) -> str:
        own = self.tensors[name]
        key = (id(own), rows)
        if key not in self._fingerprints:
            # not detached, a weight of bitsandbytes still has its scales
            tensor = whole(own.detach()) if is_sharded(own) else own
            if rows is not None:
                tensor = tensor.detach()[:rows]
            self._fingerprints[key] = tensor_fingerprint(tensor)
        return self._fingerprints[key]

    def check_bases(self, on_other: Callable[[str, SpectralLayer], None]) -> None:
        """Call `on_other` with every layer whose factors were made from another weight than it has now.

        Warns of a model that was cast after its factors were made.
        """
        cast = []
        for name, layer in spectral_layers(self.model):
            match = layer.basis_of(self._fingerprint(f"{name}.weight"))
            if match is None:
                cast.append(name)
            elif not match:
                on_other(name, layer)
        if cast:
            warnings.warn(
                f"the model was cast after its factors were made ({cast[0]} and {len(cast) - 1} more). A "
                "plain model makes them from the cast weights, so that an adapter carried from one to the "
                "other acts in a basis some percent off (bfloat16): cast a model before spectralize()",
                stacklevel=4,
            )

    def names(self, stored: Iterable[str]) -> list[str]:
        """Names of what an adapter leaves out that stores the tensors `stored`; tied ones count once."""
        seen = {id(self.tensors[name]) for name in stored if name in self.tensors}
        found = []
        for name, tensor in self.tensors.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found.append(name)
        return found

    def changed(self, stored: Iterable[str], buffers: Mapping[str, str]) -> list[str]:
        """Names of what is trained, or moved, beside the tensors `stored`: state of the adapter too.

        Args:
            stored: names of the tensors that the adapter has.
            buffers: digests of the buffers as they were (`buffer_digests`).

        Raises:
            ValueError: the weight of an adapted layer is trained, or the tables of tasks are, or a module's
                extra state moved; the message names it.
        """
        table = next((n for n, _ in self.model.named_parameters() if n.startswith(TABLES)), None)
        if table is not None:
            raise ValueError(
                f"{table} is trainable but no part of the adapter, for it holds all tasks: call "
                "requires_grad_(False) of the bank, and set_task() for the one to be saved"
            )
        check_extra_state(self.model, buffers)
        layers = {f"{name}.weight" for name, _ in spectral_layers(self.model)}
        found = []
        for name in self.names(stored):
            tensor = self.tensors[name]
            if isinstance(tensor, nn.Parameter):
                if not tensor.requires_grad:
                    continue
                if name in layers:
                    raise ValueError(
                        f"{name} is trainable, and the layer's basis is made from it, so that the adapter "
                        "could not be loaded: freeze it, or name the layer in modules_to_save instead of "
                        "adapting it; nothing was written"
                    )
            elif self.digest(name) == buffers.get(name):
                continue
            found.append(name)
        return found

    def describe(self, stored: Iterable[str]) -> dict[str, Any]:
        """What an adapter file says of the base: `base`, and `rows` of what may have more elsewhere."""
        names = self.names(stored)
        embeddings = self._embeddings
        return {
            "base": {in_file(name): self.digest(name) for name in names},
            "rows": {in_file(n): len(self.tensors[n]) for n in names if n in embeddings},
        }

    def check(
        self,
        meta: Mapping[str, Any],
        stored: Iterable[str],
        folder: Path,
        used: Iterable[str] | None,
    ) -> None:
        """Compare with what a folder says of its base.

        Args:
            meta: of the folder, with `base` and `rows` as `describe` made them.
            stored: names of the tensors that the folder has.
            used: None, or names of the layers whose coefficients are not zero: then what differs
                elsewhere is no error but a warning.

        Raises:
            AdapterError: a tensor differs, or only one of both has it; the message names it.
        """
        told, rows = meta["base"], meta["rows"]
        names = self.names(stored)
        embeddings = self._embeddings
        differing = sorted(set(names).symmetric_difference(told))
        for name in names:
            if name not in told:
                continue
            length = rows.get(name)
            # the rows of further tokens mean nothing to an adapter that never saw them
            longer = name in embeddings and length and len(self.tensors[name]) > length
            if self.digest(name, length if longer else None) != told[name]:
                differing.append(name)
        heads = tuple(f"{head}." for head in unsaved_heads(self.model, meta["modules_to_save"]))
        foreign = [name for name in differing if heads and name.startswith(heads)]
        differing = [name for name in differing if name not in foreign]
        if used is not None:
            needed = tuple(f"{layer}." for layer in used)
            passed = [n for n in differing if not n.startswith(needed) and n in told and n in names]
            foreign, differing = [*passed, *foreign], [n for n in differing if n not in passed]
        if differing:
            raise AdapterError(f"{folder}: {self._message(meta, differing, names)}")
        if foreign:
            warnings.warn(
                f"{folder}: the adapter was trained beside another {_listed(foreign)}, which it does not "
                "hold: outputs may differ too",
                stacklevel=4,
            )

    def _message(self, meta: Mapping[str, Any], differing: list[str], names: list[str]) -> str:
        made_from = f" ({excerpt(meta['base_model'])})" if meta["base_model"] else ""
        told = meta["base"]
        name, listed = differing[0], _listed(differing)
        text = f"the adapter was made from other base weights{made_from}: not the same are {listed}"
        if name not in told:
            return (
                f"{text}; the adapter's base had no frozen {excerpt(name)}: tied, or another model"
            )
        if name not in names:
            return f"{text}; this model has no frozen {excerpt(name)}: tied, or another model"
        if meta["rows"].get(name, 0) > len(self.tensors[name]):
            return (
                f"{text}; {excerpt(name)} had {meta['rows'][name]} rows and has {len(self.tensors[name])}: "
                "model.resize_token_embeddings() first, and if the new rows are drawn at random, name the "
                "embedding in modules_to_save when training"
            )
        if 2 * len(differing) > len(names):
            return (
                f"{text}, {len(differing)} of {len(names)}; coefficients only mean something in the basis of "
                "their own model: load that one, in the same dtype"
            )
        return (
            f"{text}, {len(differing)} of {len(names)}; what is drawn anew whenever the model is made "
            "(a pooler that the checkpoint lacks) must be in the adapter: name it in modules_to_save when "
            "training"
        )

    @functools.cached_property
    def _embeddings(self) -> set[str]:
        """Names of the tensors that have one row a token."""
        owners = [n for n, m in self.model.named_modules() if isinstance(m, nn.Embedding)]
        owners += output_layer_names(self.model)
        found = {f"{owner}.{leaf}" for owner in owners for leaf in ("weight", "bias")}
        tied = {id(self.tensors[name]) for name in found if name in self.tensors}
        return {name for name, tensor in self.tensors.items() if id(tensor) in tied}


def _listed(names: list[str]) -> str:
    shown = ", ".join(excerpt(name, 80) for name in names[:3])
    return f"{shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
