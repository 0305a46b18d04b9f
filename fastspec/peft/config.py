"""The configuration PEFT sees."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from fastspec import config as spectral
from fastspec.config import Basis, Rank, Select, resolve_rank
from fastspec.cores import Core
from fastspec.files import excerpt
from fastspec.svd.factors import Directions

BIASES = ("none", "all", "fastspec_only")


class PeftType(str, enum.Enum):
    """The method's name in PEFT's tables. PEFT's own `PeftType` is an enum, which can't be extended."""

    FASTSPEC = "FASTSPEC"


@dataclasses.dataclass
class SpectralConfig(PeftConfig):
    """What `peft.get_peft_model` does to a model: U, S, Vh of its weights frozen, a k x k core trained.

    Args (besides PEFT's own `task_type`, `inference_mode`, `base_model_name_or_path`, `revision`):
        r: directions kept per matrix: a count (a matrix with a shorter side keeps all it has, unless all
            of that count are such), a fraction of `min(in, out)` in (0, 1], or `"full"`.
        core: `"diag"` trains a vector [k], `"band"` the `2 * half_width + 1` diagonals around the main
            one, `"dense"` the whole k x k matrix.
        half_width: band half-width, diagonals on each side.
        select: which singular triplets: `"leading"`, `"trailing"` or a half-open range `(start, stop)`
            of their positions, 0 being the largest; a range overrides `r`.
        basis: `"svd"`, or `"random"`: a random orthonormal basis, the control.
        target_modules: `"all-linear"`, one regular expression for whole module names, or a list of names
            or their last parts. Linear layers and GPT-2's `Conv1D`.
        exclude_modules: the same forms; what matches stays plain.
        rank_pattern: `r` for some layers, by regular expressions for the ends of their names.
        layers_to_transform, layers_pattern: as in `LoraConfig`.
        modules_to_save: modules trained whole and stored with the adapter. With a `task_type` PEFT adds
            the usual heads itself.
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
    select: Select = "leading"
    basis: Basis = "svd"
    target_modules: list[str] | set[str] | str | None = "all-linear"
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
        for name in ("r", "half_width", "tol", "seed"):
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
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: which layers it is to pick")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform picks among a list of target_modules, got "
                f"target_modules={self.target_modules!r}: name the modules"
            )

    def rank_asked(self, name: str, short_side: int) -> int:
        """The rank that `r` or a pattern means for the layer `name`; a tiny matrix may have less room."""
        rank = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), name), self.r)
        return resolve_rank(rank, short_side)

    def directions(self, name: str, short_side: int) -> Directions:
        """The directions of the layer `name`, whose smaller side is `short_side`.

        Raises:
            ValueError: the matrix has fewer of them; the message names the layer.
        """
        rank = self.rank_asked(name, short_side)
        if isinstance(self.select, str):
            rank = min(rank, short_side)
        directions = Directions(rank, self.select, self.basis, self.tol, self.seed)
        try:
            directions.triplets(short_side)
        except ValueError as e:
            raise ValueError(
                f"{name}: {e}; give a smaller r or rank_pattern, or name the layer in exclude_modules "
                "or modules_to_save"
            ) from None
        return directions

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; sets are sorted, so that equal configs make equal files."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}
