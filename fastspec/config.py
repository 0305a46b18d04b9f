"""The one description of an adaptation: which matrices, which directions, which core."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastspec.cores import CORES, Core

Basis = Literal["svd", "random"]
Path = Literal["fast", "reference"]
Rank = int | float | Literal["full"]
Select = Literal["leading", "trailing"] | tuple[int, int]


@dataclasses.dataclass(frozen=True)
class SpectralConfig:
    """What `spectralize` does to a model.

    Args:
        rank: directions kept per matrix: a count (a matrix with a shorter side keeps all it has, unless
            `target_modules` lists it), a fraction of `min(in, out)` in (0, 1], `"full"`, or a mapping
            from regular expressions over module names to any of these (first match wins; the key
            `"default"` serves the rest, and without it unmatched modules stay plain).
        core: `"diag"` trains a vector [k], `"band"` the `2 * half_width + 1` diagonals around the main
            one, `"dense"` the whole k x k matrix between the frozen bases, `"low_rank"` two factors of it
            [core_rank, k].
        half_width: band half-width, diagonals on each side (core="band" only).
        core_rank: rank of the core (core="low_rank" only).
        select: which singular triplets: `"leading"`, `"trailing"` or a half-open range `(start, stop)`
            of their positions, 0 being the largest; a range overrides `rank`.
        basis: `"svd"`, or `"random"`: a random orthonormal basis of the same size, the control.
        target_modules: `"all-linear"`, a list of names (whole module names or their last parts), or
            one regular expression that must match the whole module name. Heads are never adapted.
        exclude_modules: the same forms; what matches stays plain.
        modules_to_save: modules trained whole and stored with the adapter. `None` finds the heads.
        train_bias: train the biases of adapted layers.
        train_layernorm: train the weights and biases of normalisation layers.
        tol: relative residual asked of every singular triplet.
        seed: seed of the SVD's start block and of random bases.
        path: `"fast"`, or `"reference"` to run the plain formulas of `fastspec.ops.reference`.

    Raises:
        ValueError, TypeError: a field is out of its range; the message names it.
    """

    rank: Rank | Mapping[str, Rank] = 32
    core: Core = "diag"
    half_width: int = 1
    core_rank: int = 1
    select: Select = "leading"
    basis: Basis = "svd"
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    modules_to_save: Sequence[str] | None = None
    train_bias: bool = False
    train_layernorm: bool = False
    tol: float = 1e-5
    seed: int = 0
    path: Path = "fast"

    def __post_init__(self) -> None:
        for name in ("half_width", "core_rank", "tol", "seed"):
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        if isinstance(self.rank, Mapping):
            rank: Any = {pattern: plain_number(rank) for pattern, rank in self.rank.items()}
        else:
            rank = plain_number(self.rank)
        object.__setattr__(self, "rank", rank)
        ranks = rank.items() if isinstance(rank, dict) else [("", rank)]
        for pattern, rank in ranks:
            where = f"rank[{pattern!r}]" if pattern else "rank"
            check_rank(where, rank)
            check_regex(where, pattern)
        check_core(self.core, self.half_width, self.core_rank)
        check_choice("basis", self.basis, ("svd", "random"))
        check_choice("path", self.path, ("fast", "reference"))
        # lists, as JSON has them, become tuples, so that equal configs compare equal
        for name in ("select", "target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if not isinstance(value, str) and value is not None:
                object.__setattr__(self, name, tuple(map(plain_number, value)))
        check_select(self.select)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "all-linear":
                check_regex(name, value)
        for name in ("train_bias", "train_layernorm"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not is_integer(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63), got {self.seed!r}")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol must lie in (0, 1), got {self.tol!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; `SpectralConfig(**d)` gives the same config back."""
        return {
            k: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v
            for k, v in dataclasses.asdict(self).items()
        }


def resolve_rank(rank: Rank, short_side: int) -> int:
    """The number of directions `rank` means for a matrix with `min(in, out) == short_side`."""
    if rank == "full":
        return short_side
    if isinstance(rank, float):
        return max(1, round(rank * short_side))
    assert isinstance(rank, int)
    return rank


def plain_number(value: Any) -> Any:
    """A number of another library, as NumPy's, as Python's own, which JSON knows; anything else as it is."""
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, (int, float)):
        return float(value)
    return value


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_core(core: str, half_width: int, core_rank: int) -> None:
    """Refuse a kind of core that there is not, and a size that is none or that this kind has not.

    Raises:
        ValueError: the message names the argument.
    """
    check_choice("core", core, CORES)
    for name, size, of in (
        ("half_width", half_width, "band"),
        ("core_rank", core_rank, "low_rank"),
    ):
        if not is_integer(size) or size < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {size!r}")
        if size != 1 and core != of:
            raise ValueError(
                f"{name}={size} is of core={of!r}, and core is {core!r}: leave {name} out, or give "
                f"core={of!r}"
            )


def check_select(select: Any) -> None:
    if select in ("leading", "trailing"):
        return
    ok = (
        isinstance(select, tuple)
        and len(select) == 2
        and all(map(is_integer, select))
        and 0 <= select[0] < select[1]
    )
    if not ok:
        raise ValueError(
            "select must be 'leading', 'trailing' or a range (start, stop) with "
            f"0 <= start < stop, got {select!r}"
        )


def check_rank(where: str, rank: Any) -> None:
    if isinstance(rank, str) and rank == "full":
        return
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"{where} must be an int, a float or 'full', got {rank!r}")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"{where} must be at least 1, got {rank}")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"{where} as a fraction must lie in (0, 1], got {rank}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {e}") from None
