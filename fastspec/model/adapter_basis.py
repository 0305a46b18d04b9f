"""The bases of an adapter where it is loaded: made again and compared by their sketches, or brought along."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.config import SpectralConfig
from fastspec.files import excerpt
from fastspec.model.adapter_file import AdapterError, Expected
from fastspec.model.convert import computed_factors, convert, shared_factors
from fastspec.model.fsdp import assign, whole
from fastspec.model.targets import Target, find_targets, spectral_layers
from fastspec.svd.basis_file import BasisEntry, misfit
from fastspec.svd.factors import Factors
from fastspec.svd.sketch import PROBES, TOLERANCE, distance, probed, sketch, sketches

SKETCH = "update_sketch"  # no other tensor of an adapter has a name without dots
LEAVES = ("u", "s", "vh")

Bases = dict[str, tuple[Tensor, Tensor, Tensor]]  # u [out, k], s [k], vh [k, in] by layer


@dataclasses.dataclass
class Adapters:
    """Adapters that were read for one model and share a config.

    Attributes:
        config: the model's own where it is adapted.
        sketches: of every folder, those of its layers' updates, each [8].
        tensors: of every folder, its coefficients and other state.
        bases: those that the first folder with any brings; None: there are none.
    """

    config: SpectralConfig
    folders: list[Path] = dataclasses.field(default_factory=list)
    sketches: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)
    tensors: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)
    bases: Bases | None = None

    def add(self, folder: Path, meta: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """One more, whose tensors are all that its file holds."""
        tensors = dict(tensors)
        self.sketches.append(dict(zip(meta["layers"], tensors.pop(SKETCH), strict=True)))
        if meta["bases"]:
            brought = {
                n: tuple(tensors.pop(f"{n}.{leaf}") for leaf in LEAVES) for n in meta["layers"]
            }
            self.bases = self.bases or brought  # type: ignore[assignment]
        self.folders.append(folder)
        self.tensors.append(tensors)

    def check(self, bases: Iterable[tuple[str, Tensor, Tensor]]) -> None:
        """Compare what the adapters do in these bases (name, u, vh) with what they did in their own.

        Raises:
            AdapterError: an update is another one.
        """
        for name, u, vh in bases:
            deltas = torch.stack([tensors[f"{name}.delta"] for tensors in self.tensors])
            here = sketches(probed(u, vh), deltas.to(u.device), self.config.core)
            there = torch.stack([told[name] for told in self.sketches])
            for folder, off in zip(self.folders, distance(here, there).tolist(), strict=True):
                if not off <= TOLERANCE:
                    raise AdapterError(
                        f"{folder}: the basis of {excerpt(name)} here is another one than the adapter's: its "
                        f"update differs by {off:.0%}, where rounding differs by less than {TOLERANCE:.0%}. "
                        "Either the weight has tied singular values, whose vectors depend on threads and "
                        "machine, or the adapter was trained in a basis of its own: save it with "
                        "save_adapter(model, folder, bases=True)"
                    )

    def convert(self, model: nn.Module) -> None:
        """Adapt a plain model by the config, in the bases that are brought, or else in new ones.

        Raises:
            ValueError, TypeError: as `fastspec.spectralize`.
            AdapterError: as `check`. The model is unchanged.
        """
        targets, heads = find_targets(model, self.config, factors_given=self.bases is not None)
        factors = shared_factors(targets, self._brought if self.bases else computed_factors)
        self.check((t.name, f.u, f.vh) for t, f in zip(targets, factors, strict=True))
        convert(model, self.config, targets, heads, factors)

    def _brought(self, targets: list[Target]) -> list[Factors]:
        assert self.bases is not None
        factors = []
        for t in targets:
            u, s, vh = (tensor.to(t.matrix.device) for tensor in self.bases[t.name])
            singular = _is_singular(t.matrix, u, s, vh, self.config)
            factors.append(Factors(u, s, vh, singular))
        return factors

    def hold_bases(self, model: nn.Module) -> None:
        """Give an adapted model the bases that are brought, in place."""
        assert self.bases is not None
        for name, layer in spectral_layers(model):
            for leaf, tensor in zip(LEAVES, self.bases[name], strict=True):
                assign(getattr(layer, leaf), tensor)
            u, s, vh = (whole(getattr(layer, leaf)) for leaf in LEAVES)
            stored = layer.weight if layer.base_weight is None else layer.base_weight
            matrix = layer._matrix(whole(stored.detach()))
            layer._singular_dtype = u.dtype if _is_singular(matrix, u, s, vh, self.config) else None
            layer._kept = None


def _is_singular(w: Tensor, u: Tensor, s: Tensor, vh: Tensor, config: SpectralConfig) -> bool:
    """Whether W V = U S, which a folder may say of any u and vh."""
    # a quantised weight is not what the factors were made of
    if config.basis != "svd" or type(w.data) is not Tensor or u.dtype != w.dtype:
        return False
    return misfit(w, BasisEntry(u, s, vh, "", config.tol)) is None


def bases_of(model: nn.Module) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Name, u and vh of each layer of an adapted model."""
    for name, layer in spectral_layers(model):
        yield name, whole(layer.u), whole(layer.vh)


@torch.no_grad()
def basis_tensors(model: nn.Module, whole_bases: bool) -> dict[str, Tensor]:
    """What the file of an adapter holds of its bases: the sketches [layers, 8], and on request all."""
    layers = dict(spectral_layers(model))
    own = [
        sketch(probed(u, vh), whole(layers[name].delta), layers[name].core)
        for name, u, vh in bases_of(model)
    ]
    found = {SKETCH: torch.stack(own)}
    if whole_bases:
        found |= {
            f"{n}.{leaf}": getattr(layer, leaf) for n, layer in layers.items() for leaf in LEAVES
        }
    return found


def expected_bases(
    model: nn.Module, targets: Iterable[Target], meta: Mapping[str, Any]
) -> Expected:
    """The tensors of `basis_tensors` for an adapted `model`, or for a plain one with these targets."""
    expected: Expected = {SKETCH: ((len(meta["layers"]), PROBES), torch.float32)}
    if not meta["bases"]:
        return expected
    for name, layer in spectral_layers(model):
        for leaf in LEAVES:
            tensor = getattr(layer, leaf)
            expected[f"{name}.{leaf}"] = (tuple(tensor.shape), tensor.dtype)
    for t in targets:
        (out_features, in_features), k, dtype = t.shape, t.directions.rank, t.dtype
        expected[f"{t.name}.u"] = ((out_features, k), dtype)
        expected[f"{t.name}.s"] = ((k,), torch.promote_types(dtype, torch.float32))
        expected[f"{t.name}.vh"] = ((k, in_features), dtype)
    return expected
