"""What each method trains, at which learning rate, and what it leaves on disk."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.availability import install_advice
from fastspec.model.parameter_groups import parameter_groups, parameter_kind
from fastspec.model.targets import matcher
from fastspec.studies import core_maps
from fastspec.studies.glue.config import GlueConfig


@dataclasses.dataclass(frozen=True)
class Rate:
    """A learning rate and where it comes from."""

    value: float
    source: str


_FIRST_LOOK = "MiniLM on SST-2, 8,000 rows, 3 epochs, one seed"

# keyed by method, or by method and core
RATES = {
    "spectral-diag": Rate(3e-2, f"{_FIRST_LOOK}: 84.6 here, 79.4 at 1e-1"),
    "spectral-band": Rate(
        5e-3, "docs/results.md: CoLA 27.8, 16.3 at 2e-2; SST-2 84.3, in the first look 85.2 at 2e-2"
    ),
    "spectral-dense": Rate(
        3e-3, f"docs/results.md: CoLA 22.5, 12.9 at 1e-2; {_FIRST_LOOK} 84.5 to 84.8 at 1e-2"
    ),
    "spectral-low_rank": Rate(1e-3, "as LoRA, whose update it has; not searched"),
    "lora": Rate(1e-3, f"{_FIRST_LOOK}: 85.9"),
    "pissa": Rate(1e-3, "as LoRA, whose budget and parametrisation it shares; not searched"),
    "bitfit": Rate(
        1e-3,
        "the upper end of the BitFit paper's grid (arXiv 2106.10199); docs/results.md: CoLA 17.4, "
        "18.8 at 2e-3",
    ),
    "full": Rate(
        1e-4, "customary for encoders of this size; docs/results.md: CoLA 29.2, 30.2 at 5e-5"
    ),
    "head": Rate(1e-3, f"{_FIRST_LOOK}: 72.0"),
}
TRAINED = "trained.safetensors"

HEAD_RATE = Rate(1e-3, f"{_FIRST_LOOK}, with every method")
BIAS_RATE = Rate(1e-3, f"{_FIRST_LOOK}: biases and LayerNorm beside coefficients")


def default_rate(config: GlueConfig) -> Rate:
    """The learning rate used where `config.lr` is None."""
    key = f"spectral-{config.core}" if config.method == "spectral" else config.method
    return RATES[key]


def rates(config: GlueConfig) -> dict[str, float]:
    """The learning rate of each kind of parameter, by the names of `optimizer_groups`."""
    main = default_rate(config).value if config.lr is None else config.lr
    head = HEAD_RATE.value if config.head_lr is None else config.head_lr
    if config.method == "head" and config.lr is not None and config.head_lr is None:
        head = config.lr
    bias = BIAS_RATE.value if config.bias_lr is None else config.bias_lr
    return {"coefficients": main, "adapter": main, "extra": bias, "head": head}


def head_modules(model: nn.Module, train_pooler: bool = False) -> list[str]:
    """Names of the modules of a sequence classifier that are not its pretrained body.

    Args:
        model: of transformers.
        train_pooler: as in `GlueConfig`.

    Raises:
        ValueError: the model has no body and head of its own.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        raise ValueError(
            f"{type(model).__name__} has no base model apart from its head; expected a "
            "transformers sequence classifier"
        )
    heads = [
        name
        for name, child in model.named_children()
        if name != prefix and next(child.parameters(), None) is not None
    ]
    if not heads:
        raise ValueError(f"{type(model).__name__} has no head with parameters beside {prefix!r}")
    # None in models that pool otherwise
    if train_pooler and getattr(getattr(model, prefix), "pooler", None) is not None:
        heads.insert(0, f"{prefix}.pooler")
    return heads


def apply(model: nn.Module, config: GlueConfig) -> nn.Module:
    """The model with exactly the method's parameters and the head trainable."""
    heads = head_modules(model, config.train_pooler)
    if config.method == "spectral":
        import fastspec

        model = fastspec.spectralize(model, config.spectral(heads))
        return model if config.core_map is None else core_maps.install(model, config.core_map)
    if config.method in ("lora", "pissa"):
        return _low_rank(model, config, heads)
    for name, parameter in model.named_parameters():
        trains = (
            config.method == "full"
            or _inside(name, heads)
            or (config.method == "bitfit" and name.endswith("bias"))
        )
        parameter.requires_grad_(trains)
    return model


def _low_rank(model: nn.Module, config: GlueConfig, heads: list[str]) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as e:
        raise ImportError(
            f"--method {config.method} needs peft ({e}); {install_advice('peft')}"
        ) from e
    pissa = config.method == "pissa"
    peft_config = LoraConfig(
        task_type="SEQ_CLS",
        r=config.lora_rank,
        # PiSSA (arXiv 2404.02948) scales by 1; for LoRA alpha = 2 r is the common choice
        lora_alpha=config.lora_rank * (1 if pissa else 2),
        lora_dropout=0.0,
        init_lora_weights="pissa" if pissa else True,
        target_modules=body_linears(model, heads, config.target_pattern),
        modules_to_save=heads,
    )
    with warnings.catch_warnings():
        # about a property PEFT asks for; nothing a user could act on
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        return get_peft_model(model, peft_config)


def body_linears(model: nn.Module, heads: Iterable[str], pattern: str) -> list[str]:
    """Full names of the linear layers below the head that `target_modules` means.

    Raises:
        ValueError: there are none.
    """
    heads, wanted = list(heads), matcher(pattern)
    below = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _inside(f"{name}.weight", heads)
    ]
    names = [name for name in below if wanted(name)]
    if not names:
        raise ValueError(
            f"target_modules={pattern!r} matches no linear layer below the head; the model has: "
            f"{', '.join(below[:8])}{', ...' if len(below) > 8 else ''}"
        )
    return names


def _inside(name: str, heads: Iterable[str]) -> bool:
    return parameter_kind(name, heads) == "head"


def optimizer_groups(
    model: nn.Module, heads: Iterable[str], config: GlueConfig
) -> list[dict[str, Any]]:
    """Optimiser groups with "name", "lr", "weight_decay", "params": those of `fastspec.parameter_groups`,
    where what another method trains beside the head is called "adapter"."""
    rate = rates(config)
    coefficients = config.method == "spectral" and config.core_map is None
    rest = "extra" if coefficients else "adapter"
    groups = parameter_groups(
        model,
        rate["coefficients"],
        head_lr=rate["head"],
        bias_lr=rate[rest],
        coefficient_decay=config.coefficient_decay,
        weight_decay=config.weight_decay,
        heads=heads,
    )
    return [g | {"name": rest} if g["name"] == "extra" else g for g in groups]


def count_parameters(model: nn.Module, heads: Iterable[str]) -> dict[str, int]:
    """Parameters trainable outside the head ("adapter") and in it ("head"), and all ("total").

    The same count for every method: the untrained copy of the head that PEFT keeps is left out.
    """
    heads = list(heads)
    counts = {"adapter": 0, "head": 0, "total": 0}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        counts["total"] += parameter.numel()
        if parameter.requires_grad:
            counts["head" if _inside(name, heads) else "adapter"] += parameter.numel()
    return counts


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training can change: trainable parameters and persistent buffers, by name."""
    return dict(_trained(model))


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(model.named_parameters())
    buffers = {name for name, _ in model.named_buffers()}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in buffers or (name in parameters and parameters[name].requires_grad):
            yield name, value.detach()


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Inverse of `trained_state`, in place.

    Raises:
        ValueError: names or shapes differ from what this model trains.
    """
    own = trained_state(model)
    if own.keys() != state.keys():
        odd = ", ".join(sorted(own.keys() ^ state.keys())[:5])
        raise ValueError(
            f"the checkpoint does not hold what this run trains; differing names: {odd}"
        )
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"checkpoint {name}: expected shape {list(value.shape)}, "
                f"got {list(state[name].shape)}"
            )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])


def save(model: nn.Module, config: GlueConfig, folder: Path) -> int:
    """Write the trained part to `folder` in the method's own format; returns the weights' bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    if _own_basis(config):
        import fastspec

        fastspec.save_adapter(model, folder)
    elif config.method in ("lora", "pissa"):
        # nothing but linear layers is adapted, so PEFT need not ask whether embeddings were resized
        model.save_pretrained(folder, save_embedding_layers=False)  # type: ignore[operator]
    else:
        from safetensors.torch import save_file

        state = {k: v.contiguous().cpu() for k, v in trained_state(model).items()}
        save_file(state, folder / TRAINED)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def restore(model: nn.Module, config: GlueConfig, folder: Path) -> None:
    """Inverse of `save`, in place, for a model to which the method was applied."""
    if _own_basis(config):
        import fastspec

        fastspec.load_adapter(model, folder)
        return
    from safetensors.torch import load_file

    if config.method in ("lora", "pissa"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    else:
        load_trained_state(model, load_file(folder / TRAINED))


def _own_basis(config: GlueConfig) -> bool:
    """Whether a fastspec adapter describes the run: its factors come from the adapted weights alone."""
    return config.method == "spectral" and config.basis_model is None and config.core_map is None
