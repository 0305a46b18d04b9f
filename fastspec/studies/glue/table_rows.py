"""The rows of the suites: what is run, at which learning rates, with how many seeds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fastspec.studies.encoders import model_size
from fastspec.studies.glue.config import GRADIENT, RANDOM_MODEL
from fastspec.studies.glue.presets import PRESETS

SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a suite's table.

    Args:
        name: of the row and of its folders.
        fields: of `GlueConfig`.
        rates: learning rates tried on the first seed; the best dev score takes the others.
        seeds: seeds run at the chosen rate.
        like: a row whose chosen rate is taken over in place of a search.
        basis_of: a row whose run with the same seed gives the basis.
    """

    name: str
    fields: Mapping[str, Any] = dataclasses.field(hash=False)
    rates: tuple[float, ...] = ()
    seeds: int = 1
    like: str | None = None
    basis_of: str | None = None

    def __post_init__(self) -> None:
        if bool(self.rates) == bool(self.like):
            raise ValueError(f"row {self.name!r} needs either rates to search or a row to be like")


@dataclasses.dataclass(frozen=True)
class TaskSize:
    """How long a task is trained in a suite: epochs, rows a step, training rows (None: all), and at most
    how many seeds a row has on it (None: as many as the row says)."""

    epochs: int
    batch_size: int = 32
    max_train_rows: int | None = None
    seeds: int | None = None


TASK_SIZES = {
    "cola": TaskSize(epochs=4),
    "sst2": TaskSize(epochs=3, max_train_rows=8000),
    "rte": TaskSize(epochs=3, batch_size=16),
}
OTHER_TASKS = TaskSize(epochs=3, max_train_rows=8000)
# of suites that have sizes of their own
SUITE_SIZES = {
    "base": {
        "cola": TaskSize(epochs=3),
        "sst2": TaskSize(epochs=3, max_train_rows=8000),
        "rte": TaskSize(epochs=3, batch_size=16, seeds=1),
    }
}

# as docs/results-glue.csv spells them: `presets` means the same layers of the default model
ATTENTION = r".*(query|key|value|attention\.output\.dense|[qkvo]_proj)"
VALUES = r".*(value|attention\.output\.dense|[vo]_proj)"
MLP = r".*layer\.\d+\.(intermediate|output)\.dense"

DIAG, BAND, DENSE = (1e-2, 3e-2, 5e-2), (2e-3, 5e-3, 1e-2), (1e-3, 3e-3, 1e-2)
LOW_RANK, FULL = (5e-4, 1e-3, 2e-3), (5e-5, 1e-4, 2e-4)

_COEFFICIENTS, _BAND, _DENSE = (PRESETS[name] for name in ("coefficients", "band", "dense"))
_LOW_RANK_CORE = {"core": "low_rank", "rank": "full"}
_IN_VALUES = {"target_modules": VALUES}
_VALUES = {**PRESETS["values"], **_IN_VALUES}
_SPECTRUM = {"rate_rule": "spectrum"}
_COEFFICIENTS_ROW = Row("coefficients", _COEFFICIENTS, DIAG, SEEDS)
_BAND_ROW = Row("band", _BAND, BAND, SEEDS)
_VALUES_ROW = Row("band 4, values and outputs", _VALUES, BAND, SEEDS)
_DENSE_ROW = Row("dense 32", _DENSE, DENSE, SEEDS)
_FULL_ROW = Row("full", {"method": "full"}, FULL, SEEDS)
_BIASES_ROW = Row(
    "coefficients, biases, LayerNorm",
    {**_COEFFICIENTS, "train_bias": True, "train_layernorm": True, "bias_lr": 5e-3},
    DIAG,
)
_ATTENTION_ROW = Row(
    "dense 43, attention", {"core": "dense", "rank": 43, "target_modules": ATTENTION}, DENSE
)

HEADLINE = (
    Row("head", {"method": "head"}, (1e-3, 3e-3, 1e-2), SEEDS),
    _COEFFICIENTS_ROW,
    _BAND_ROW,
    _VALUES_ROW,
    _DENSE_ROW,
    # as many parameters as the band
    Row("lora-r1", {"method": "lora", "lora_rank": 1}, LOW_RANK, SEEDS),
    Row("lora-r8", {"method": "lora", "lora_rank": 8}, LOW_RANK, SEEDS),
    _FULL_ROW,
)
# on a base-size encoder, where runs are long: few rates
BASE = (
    Row("head", {"method": "head"}, (3e-3, 1e-2)),
    Row("coefficients", _COEFFICIENTS, (1e-2, 3e-2), SEEDS),
    Row("band", _BAND, (5e-3, 1e-2), SEEDS),
    Row("band 4, values and outputs", PRESETS["values"], (2e-3, 5e-3, 1e-2), SEEDS),
    Row("low-rank 1", _LOW_RANK_CORE, (1e-3, 2e-3, 4e-3), SEEDS),
    Row("dense 32", _DENSE, (1e-3, 3e-3)),
    Row("lora-r1", {"method": "lora", "lora_rank": 1}, (1e-3, 2e-3, 4e-3), SEEDS),
    Row("lora-r8", {"method": "lora", "lora_rank": 8}, (2e-4, 5e-4, 1e-3), SEEDS),
    Row("full", {"method": "full"}, (2e-5, 5e-5), SEEDS),
)
SWEEP = (
    Row("band, reference path", {**_BAND, "path": "reference"}, (), SEEDS, like="band"),
    Row("diag k=32", {"rank": 32}, DIAG),
    Row("diag k=128", {"rank": 128}, DIAG),
    _BIASES_ROW,
    _ATTENTION_ROW,
    Row("bitfit", {"method": "bitfit"}, (1e-3, 2e-3, 4e-3)),
    Row("pissa-r8", {"method": "pissa", "lora_rank": 8}, LOW_RANK),
)
CONTROLS = (
    _DENSE_ROW,
    Row("dense 32, random basis", {**_DENSE, "basis": "random"}, DENSE),
    Row("dense 32, gradient's basis", {**_DENSE, "basis_model": GRADIENT}, (3e-4, 1e-3, 3e-3)),
    Row("dense 32, untrained model's basis", {**_DENSE, "basis_model": RANDOM_MODEL}, DENSE),
    _FULL_ROW,
    Row("full, random labels", {"method": "full", "labels": "random"}, like="full"),
    Row("full, from scratch", {"method": "full", "start": "random"}, FULL),
    Row("dense 32, from-scratch model's basis", _DENSE, DENSE, basis_of="full, from scratch"),
    Row("dense 32, trailing", {**_DENSE, "select": "trailing"}, DENSE),
)
SEARCH = (
    _COEFFICIENTS_ROW,
    Row("coefficients, rates by spectrum", {**_COEFFICIENTS, **_SPECTRUM}, DIAG),
    _BIASES_ROW,
    _BAND_ROW,
    Row("band, rates by spectrum", {**_BAND, **_SPECTRUM}, BAND),
    Row(
        "band 2, attention",
        {"core": "band", "rank": 370, "half_width": 2, "target_modules": ATTENTION},
        BAND,
        SEEDS,
    ),
    _VALUES_ROW,
    Row(
        "lora-r4, values and outputs",
        {"method": "lora", "lora_rank": 4, "target_modules": VALUES},
        LOW_RANK,
    ),
    Row("band 4, MLP", {**_BAND, "half_width": 4, "target_modules": MLP}, BAND),
    _DENSE_ROW,
    Row("dense 32, rates by spectrum", {**_DENSE, **_SPECTRUM}, DENSE),
    _ATTENTION_ROW,
    Row(
        "dense 58, values and outputs",
        {"core": "dense", "rank": 58, "target_modules": VALUES},
        DENSE,
    ),
    Row("dense 61, MLP", {"core": "dense", "rank": 61, "target_modules": MLP}, DENSE),
    Row("low-rank 1", _LOW_RANK_CORE, (5e-4, 1e-3, 2e-3)),
    *(
        Row(name, {"core": "dense", "core_map": core_map, "rank": rank, **layers}, rates)
        for name, core_map, rank, layers, rates in (
            ("hartley", "hartley", "full", {}, (5e-3, 1e-2, 2e-2)),
            ("hartley and diagonal", "hartley-diagonal", "full", {}, (5e-3, 1e-2, 2e-2)),
            ("hartley 4, values and outputs", "hartley-4", "full", _IN_VALUES, (5e-3, 1e-2, 2e-2)),
            ("cayley 48", "cayley", 48, {}, (1e-3, 3e-3, 1e-2)),
            ("dense 32, rows by spectrum", "left", 32, {}, DENSE),
            ("dense 32, columns by spectrum", "right", 32, {}, DENSE),
            ("tied, values and outputs", "tied", "full", _IN_VALUES, (3e-4, 1e-3, 3e-3)),
        )
    ),
)


def ranges(width: int) -> tuple[Row, ...]:
    """A quarter of the directions of a model of hidden size `width` each."""
    edges = [round(i * width / 4) for i in range(5)]
    return tuple(
        Row(f"directions {a} to {b}", {"select": (a, b)}, DIAG)
        for a, b in itertools.pairwise(edges)
    )


def layers(count: int) -> tuple[Row, ...]:
    """A third of a model's layers each, under the names transformers gives them."""
    edges = [round(i * count / 3) for i in range(4)]
    return tuple(
        Row(
            f"layers {a} to {b - 1}",
            {
                **_COEFFICIENTS,
                "target_modules": rf".*\.(layer|layers|h)\.({'|'.join(map(str, range(a, b)))})\..*",
            },
            DIAG,
        )
        for a, b in itertools.pairwise(edges)
        if a < b
    )


SUITES: Mapping[str, tuple[Row, ...]] = {
    "small": HEADLINE,
    "base": BASE,
    "full": (*HEADLINE, *SWEEP),
    "controls": CONTROLS,
    "search": SEARCH,
    # of the default model; `choose` makes those of another
    "ranges": ranges(384),
    "layers": layers(6),
}


def choose(
    suite: str, names: Sequence[str] | None = None, model: str | None = None
) -> tuple[Row, ...]:
    """The rows of a named suite, or those of them named, with the rows that these need.

    Args:
        suite: a name in `SUITES`.
        names: of rows; None for all.
        model: as in `GlueConfig`; ranges of directions and of layers are parts of what it has.
    """
    rows = SUITES[suite]
    if model is not None and suite in ("ranges", "layers"):
        field, make_rows = {
            "ranges": ("hidden_size", ranges),
            "layers": ("num_hidden_layers", layers),
        }[suite]
        size = model_size(model, field)
        if size is None:
            raise ValueError(f"--suite {suite} needs a model whose configuration has {field}")
        rows = make_rows(size)
    if names is None:
        return rows
    known = {row.name: row for row in rows}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"--rows: suite {suite} has no row {unknown[0]!r}, only {', '.join(known)}"
        )
    wanted = set(names)
    for row in reversed(rows):
        if row.name in wanted:
            wanted.update(name for name in (row.like, row.basis_of) if name)
    return tuple(row for row in rows if row.name in wanted)


def with_reference(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows, and after each spectral one with rates of its own the same on the reference path."""
    names = {row.name for row in rows}
    out = []
    for row in rows:
        out.append(row)
        name = f"{row.name}, reference path"
        spectral = row.fields.get("method", "spectral") == "spectral"
        if spectral and row.rates and row.basis_of is None and name not in names:
            fields = {**row.fields, "path": "reference"}
            out.append(Row(name, fields, seeds=row.seeds, like=row.name))
    return tuple(out)
