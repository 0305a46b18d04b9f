"""The description of one finetuning run: everything that decides its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fastspec.config import Basis, Rank, Select, SpectralConfig
from fastspec.config import Path as Arithmetic
from fastspec.cores import LINEAR, Core
from fastspec.studies.glue.presets import TARGETS
from fastspec.studies.glue.tasks import TASKS

Method = Literal["spectral", "full", "head", "bitfit", "lora", "pissa"]
METHODS = ("spectral", "full", "head", "bitfit", "lora", "pissa")
RATE_RULES = ("flat", "spectrum")
START = ("pretrained", "random")
LABELS = ("true", "random")
CORE_MAPS = ("hartley", "hartley-diagonal", "hartley-4", "cayley", "tied", "left", "right")
RANDOM_MODEL = "random"
GRADIENT = "gradient"


@dataclasses.dataclass(frozen=True)
class GlueConfig:
    """One run of `fastspec glue`.

    Args:
        task: a name in `fastspec.studies.glue.tasks.TASKS`.
        method: what is trained beside the head.
        model: a folder or a hub name; None takes the MiniLM that the `demo` extra installs.
        data: a folder of GLUE files; None looks further (`fastspec.studies.glue.data.load`).
        path, rank, core, half_width, core_rank, select, basis, target_modules, train_bias, train_layernorm:
            for method="spectral", as in `fastspec.SpectralConfig`; `target_modules` may also be
            "attention", "values" (with the output projection) or "mlp", on any encoder
            (`fastspec.studies.glue.presets.TARGETS`).
        core_map: what makes the core from other trained numbers (`fastspec.studies.core_maps`).
        basis_model: for method="spectral", the model whose singular vectors are the basis in place of
            the adapted weights' own: "random" for an untrained one of the same architecture, or the
            folder of a finished run or a model (the controls); "gradient" for those of the task's
            gradient before training (`fastspec.studies.glue.donor_basis`).
        start: "pretrained", or "random" to train from a random initialisation.
        labels: "true", or "random" to train on permuted labels; dev labels stay as they are.
        lora_rank: rank of method="lora" and "pissa".
        lr: learning rate of what the method trains; None takes `methods.default_rate`.
        rate_rule: "flat" gives every coefficient of a layer the same rate, "spectrum" one in
            proportion to its singular value (`methods.spectral_scale`), with the same mean.
        train_pooler: count the body's pooler, where it has one, to the head: it is trained whole. For a
            checkpoint whose pooler pretraining never touched, such as the default model's.
        head_lr: learning rate of the head, None for the default.
        bias_lr: learning rate of biases and LayerNorm beside coefficients, None for the default.
        weight_decay: of trained matrices other than coefficients.
        coefficient_decay: of spectral coefficients; it pulls towards the pretrained spectrum.
        warmup: share of the steps over which the rates rise linearly; then they fall linearly to 0.
        epochs, batch_size, seed: as everywhere.
        max_length: longest row, in tokens; what is longer is cut.
        max_train_rows: only the first so many rows are trained on.
        bf16: products in bfloat16, under autocast; everything that is trained stays float32.
        save_steps: steps between checkpoints inside an epoch; every epoch's end has one anyway.

    Raises:
        ValueError, TypeError: a field is out of its range; the message names it.
    """

    task: str
    method: Method = "spectral"
    model: str | None = None
    data: str | None = None
    path: Arithmetic = "fast"
    rank: Rank | Mapping[str, Rank] = 32
    core: Core = "diag"
    half_width: int = 1
    core_rank: int = 1
    select: Select = "leading"
    basis: Basis = "svd"
    target_modules: str = "all-linear"
    train_bias: bool = False
    train_layernorm: bool = False
    core_map: str | None = None
    basis_model: str | None = None
    start: Literal["pretrained", "random"] = "pretrained"
    labels: Literal["true", "random"] = "true"
    lora_rank: int = 8
    lr: float | None = None
    rate_rule: Literal["flat", "spectrum"] = "flat"
    train_pooler: bool = False
    head_lr: float | None = None
    bias_lr: float | None = None
    weight_decay: float = 0.0
    coefficient_decay: float = 0.0
    warmup: float = 0.1
    epochs: int = 3
    batch_size: int = 32
    max_length: int = 128
    max_train_rows: int | None = None
    seed: int = 0
    save_steps: int = 200
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        for name, choices in (
            ("method", METHODS),
            ("rate_rule", RATE_RULES),
            ("start", START),
            ("labels", LABELS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.basis_model is not None and (self.method, self.basis) != ("spectral", "svd"):
            raise ValueError(
                "basis_model gives the singular vectors of method='spectral' with basis='svd', got "
                f"method={self.method!r} and basis={self.basis!r}"
            )
        if self.core_map is not None:
            cores = LINEAR if self.core_map in ("left", "right") else ("dense",)
            fits = self.method == "spectral" and self.core in cores
            if self.core_map not in CORE_MAPS or not fits:
                raise ValueError(
                    f"core_map must be one of {', '.join(CORE_MAPS)}, for method='spectral' and, but "
                    f"for left and right, core='dense', got {self.core_map!r} for "
                    f"method={self.method!r} with core={self.core!r}"
                )
        if self.rate_rule == "spectrum" and self.core not in LINEAR:
            raise ValueError(
                f"rate_rule='spectrum' is not for core={self.core!r}, whose rows are factors"
            )
        for name in ("lora_rank", "epochs", "batch_size", "max_length", "save_steps"):
            _check_count(name, getattr(self, name))
        if self.max_train_rows is not None:
            _check_count("max_train_rows", self.max_train_rows)
        for name in ("lr", "head_lr", "bias_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        for name in ("weight_decay", "coefficient_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, in [0, 1], got {self.warmup!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2^32), got {self.seed!r}")
        self.spectral()  # its own checks, before anything is loaded

    @property
    def target_pattern(self) -> str:
        """`target_modules` as `fastspec.SpectralConfig` takes it."""
        return TARGETS.get(self.target_modules, self.target_modules)

    def spectral(self, heads: list[str] | None = None) -> SpectralConfig:
        """What method="spectral" does to the model, with `heads` as the modules trained whole."""
        return SpectralConfig(
            rank=self.rank,
            core=self.core,
            half_width=self.half_width,
            core_rank=self.core_rank,
            select=self.select,
            # other weights' vectors replace these, and are no singular basis of the adapted ones either
            basis="random" if self.basis_model else self.basis,
            target_modules=self.target_pattern,
            modules_to_save=heads,
            train_bias=self.train_bias,
            train_layernorm=self.train_layernorm,
            seed=self.seed,
            path=self.path,
        )

    def label(self) -> str:
        """A short name of the method and its size, for tables and folders."""
        suffixes = [
            "some-layers" if self.target_modules != "all-linear" else "",
            "scratch" if self.start == "random" else "",
            "random-labels" if self.labels == "random" else "",
            "pooler" if self.train_pooler else "",
            "bf16" if self.bf16 else "",
        ]
        return "-".join(p for p in [self._method_label(), *suffixes] if p)

    def _method_label(self) -> str:
        if self.method in ("lora", "pissa"):
            return f"{self.method}-r{self.lora_rank}"
        if self.method != "spectral":
            return self.method
        select = self.select if isinstance(self.select, str) else "{}to{}".format(*self.select)
        parts = [
            "spectral",
            {"band": f"band{self.half_width}", "low_rank": f"low-rank{self.core_rank}"}.get(
                self.core, self.core
            ),
            self.core_map or "",
            "k-by-layer" if isinstance(self.rank, Mapping) else f"k{self.rank}",
            select if select != "leading" else "",
            self.basis if self.basis != "svd" else "",
            f"of-{Path(self.basis_model).name}" if self.basis_model else "",
            "spectrum" if self.rate_rule == "spectrum" else "",
            "bias" if self.train_bias else "",
            "ln" if self.train_layernorm else "",
            self.path if self.path != "fast" else "",
        ]
        return "-".join(p for p in parts if p)

    def folder_name(self) -> str:
        """The default output folder's name: task, method and seed."""
        return f"{self.task}-{self.label()}-seed{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; `GlueConfig.from_dict` gives the same config back."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GlueConfig:
        select = fields.get("select", "leading")
        return cls(**{**fields, "select": tuple(select) if isinstance(select, list) else select})


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
