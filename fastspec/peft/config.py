"""The configuration PEFT sees."""

from __future__ import annotations

import copy
import dataclasses
import enum
import glob
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.config import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from fastspec import config as spectral
from fastspec.config import Basis, Rank, Select, resolve_rank
from fastspec.cores import Core
from fastspec.files import excerpt
from fastspec.model.adapter_file import AdapterError
from fastspec.svd.factors import Directions

BIASES = ("none", "all", "fastspec_only")
ALL_LINEAR = "all-linear"
# the fields that using a config for a model changes
RESOLVED = ("target_modules", "modules_to_save", "rank_pattern", "base_fingerprint")


class PeftType(str, enum.Enum):
    """The method's name in PEFT's tables. PEFT's own `PeftType` is an enum, which can't be extended."""

    FASTSPEC = "FASTSPEC"


@dataclasses.dataclass
class SpectralConfig(PeftConfig):
    """What `peft.get_peft_model` does to a model: U, S, Vh of its weights frozen, a k x k core trained.

    Args (besides PEFT's own `task_type`, `inference_mode`, `base_model_name_or_path`, `revision`):
        r: directions kept per matrix: a count, a fraction of `min(in, out)` in (0, 1], or `"full"`. Where
            `target_modules` lists no names, a matrix too small for a count that others serve keeps all.
        core: `"diag"` trains a vector [k], `"band"` the `2 * half_width + 1` diagonals around the main
            one, `"dense"` the whole k x k matrix, `"low_rank"` two factors of it [core_rank, k].
        half_width: band half-width, diagonals on each side.
        core_rank: rank of a low-rank core.
        select: which singular triplets: `"leading"`, `"trailing"` or a half-open range `(start, stop)`
            of their positions, 0 being the largest; a range overrides `r`.
        basis: `"svd"`, or `"random"`: a random orthonormal basis, the control.
        target_modules: `"all-linear"`, one regular expression for whole module names, or a list of names
            or their last parts. Linear layers and GPT-2's `Conv1D`.
        exclude_modules: the same forms; what matches stays plain.
        rank_pattern: `r` for some layers, by regular expressions for the ends of their names.
        layers_to_transform, layers_pattern: as in `LoraConfig`, and with `"all-linear"` too.
        modules_to_save: modules trained whole and stored with the adapter. With a `task_type` of
            classification or question answering the usual heads are added; where none is named, all
            new modules of the model.
        bias: `"none"`, or biases to train as well: `"all"`, or `"fastspec_only"`, those of the adapted
            layers.
        tol: relative residual asked of every singular triplet.
        seed: of the SVD's start block and of random bases.
        base_fingerprint: what ties a saved adapter to the base weights its basis is rebuilt from: a digest
            of each adapted layer's. PEFT's `save_pretrained` stores it, loading checks it. Leave it out
            for a new adapter.

    Raises:
        ValueError, TypeError: a field is out of its range; the message names it.
    """

    r: Rank = 32
    core: Core = "diag"
    half_width: int = 1
    core_rank: int = 1
    select: Select = "leading"
    basis: Basis = "svd"
    target_modules: list[str] | set[str] | str | None = ALL_LINEAR
    exclude_modules: list[str] | set[str] | str | None = None
    rank_pattern: dict[str, Rank] = dataclasses.field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    tol: float = 1e-5
    seed: int = 0
    base_fingerprint: dict[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.FASTSPEC  # type: ignore[assignment]
        for name in ("r", "half_width", "core_rank", "tol", "seed"):
            setattr(self, name, spectral.plain_number(getattr(self, name)))
        if isinstance(self.select, (list, tuple)):  # a list, as JSON has it
            self.select = tuple(map(spectral.plain_number, self.select))  # type: ignore[assignment]
        self.rank_pattern = {k: spectral.plain_number(v) for k, v in self.rank_pattern.items()}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        # the same fields under the same rules
        spectral.SpectralConfig(
            core=self.core,
            half_width=self.half_width,
            core_rank=self.core_rank,
            select=self.select,
            basis=self.basis,
            tol=self.tol,
            seed=self.seed,
        )
        spectral.check_rank("r", self.r)
        for pattern, rank in self.rank_pattern.items():
            spectral.check_regex("rank_pattern", pattern)
            spectral.check_rank(f"rank_pattern[{pattern!r}]", rank)
        if self.bias not in BIASES:
            raise ValueError(
                f"bias must be one of {', '.join(map(repr, BIASES))}, got {self.bias!r}"
            )
        told = self.base_fingerprint
        if told is not None and not (
            isinstance(told, dict) and all(isinstance(v, str) for v in told.values())
        ):
            raise TypeError(f"base_fingerprint must map layers to digests, got {excerpt(told)}")
        some_layers = self.layers_to_transform not in (None, [])
        if self.layers_pattern and not some_layers:
            raise ValueError("layers_pattern needs layers_to_transform: which layers it is to pick")
        targets = self.target_modules
        if some_layers and isinstance(targets, str) and targets.lower() != ALL_LINEAR:
            raise ValueError(
                f"layers_to_transform picks among a list of target_modules or {ALL_LINEAR!r}, got "
                f"target_modules={targets!r}: name the modules"
            )

    def rank_of(self, name: str, short_side: int) -> int:
        """The rank the config asks of a layer, which may be above its short side."""
        rank = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        return resolve_rank(rank, short_side)

    def directions(self, name: str, short_side: int) -> Directions:
        """The directions of the layer `name`, whose smaller side is `short_side`.

        Raises:
            ValueError: the matrix has fewer of them; the message names the layer.
        """
        rank = self.rank_of(name, short_side)
        directions = Directions(rank, self.select, self.basis, self.tol, self.seed)
        try:
            directions.triplets(short_side)
        except ValueError as e:
            raise ValueError(
                f"{name}: {e}; give a smaller r or rank_pattern, or name the layer in exclude_modules "
                "or modules_to_save"
            ) from None
        return directions

    def name_layers(self, ranks: Mapping[str, int], modules_to_save: list[str]) -> None:
        """Let the config say by full names which layers of which ranks it means, and what is saved whole."""
        self.target_modules = "|".join(map(re.escape, sorted(ranks)))  # matched against whole names
        self.modules_to_save = modules_to_save or None
        self.r = max(ranks.values())
        self.rank_pattern = {}
        if any(rank != self.r for rank in ranks.values()):
            # matched against the ends of names, the first that fits: a layer's own name before parts of it
            longest_first = sorted(ranks, key=len, reverse=True)
            self.rank_pattern = {re.escape(layer): ranks[layer] for layer in longest_first}

    def for_new_adapter(self) -> SpectralConfig:
        """This very config, as PEFT has it; if it is some adapter's already, a copy as that one was given.

        A field that was changed since by somebody else keeps the change.
        """
        resolved: dict[str, tuple[Any, Any]] | None = vars(self).get("_resolved")
        if resolved is None:
            return self
        config = copy.copy(self)
        del config._resolved
        vars(config)["_copied_from"] = self
        for name, (given, became) in resolved.items():
            value = getattr(self, name)
            setattr(config, name, copy.copy(given if value == became else value))
        return config

    def settled(self) -> SpectralConfig:
        """The config for the adapter to keep: the one this was copied from, where both came to the same."""
        origin: SpectralConfig | None = vars(self).pop("_copied_from", None)
        return self if origin is None or origin.to_dict() != self.to_dict() else origin

    @contextmanager
    def resolving(self) -> Iterator[None]:
        """Around what fits the config to a model: after an error it is as it was given."""
        given = {name: copy.copy(getattr(self, name)) for name in RESOLVED}
        try:
            yield
        except BaseException:
            vars(self).update(given)
            raise
        self._resolved = {name: (value, getattr(self, name)) for name, value in given.items()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """The config of a folder, whose tensors are looked at too: PEFT reads them after it changed a model.

        Raises:
            AdapterError: the folder's tensors are truncated or no safetensors file.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        path = os.path.join(
            pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME
        )
        if os.path.isfile(path):
            try:
                with safe_open(path, "pt"):  # compares the header with the size
                    pass
            except SafetensorError as e:
                raise AdapterError(
                    f"{path}: truncated, damaged or no safetensors file: {excerpt(e)}"
                ) from None
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config; warn where a model lies, with which transformers then loads the adapter."""
        if glob.glob(os.path.join(glob.escape(save_directory), "model*.safetensors")):
            warnings.warn(
                f"{save_directory} holds a whole model: transformers will load the adapter with it from now "
                "on, and fail where fastspec.peft was not imported. Save the adapter in a folder of its own",
                stacklevel=2,
            )
        super().save_pretrained(save_directory, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; sets are sorted, so that equal configs make equal files."""
        fields = {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}
        if self.modules_to_save is not None:  # PEFT enters its own names again and again
            fields["modules_to_save"] = list(dict.fromkeys(self.modules_to_save))
        return fields
