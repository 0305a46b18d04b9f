"""PEFT adapter folders from anybody: checked as a whole before anything of the model is changed.

PEFT's own loader wraps the layers first and reads the tensors afterwards, runs the regular expressions of the
folder's config, takes a pickle where there is no safetensors file, and only warns of missing tensors. This
one takes the layers and their ranks from the tensors, and nothing from the config that could be a pattern.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    set_peft_model_state_dict,
)
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastspec.cores import delta_shape
from fastspec.files import ADAPTER_FILE, excerpt
from fastspec.fingerprint import tensor_fingerprint
from fastspec.model.adapter_file import (
    MAX_HEADER_BYTES,
    AdapterError,
    Expected,
    check_tensors,
    read_bounded,
)
from fastspec.model.buffers import is_unset_buffer
from fastspec.peft.beside import DELTA, NOTE, SKETCH, base_model_of, base_tensors, check_alone
from fastspec.peft.config import PeftType, SpectralConfig
from fastspec.peft.conversion import PREFIX
from fastspec.peft.layer import BASE, SpectralLinear
from fastspec.peft.model import SpectralModel, check_fingerprints
from fastspec.peft.targets import ANSWERS, CLASSIFIERS, check_target
from fastspec.svd.sketch import PROBES

MAX_CONFIG_BYTES = 4 << 20  # 10,000 layers take one
TEXTS = ("base_model_name_or_path", "revision")
FIELDS = (
    "core",
    "half_width",
    "core_rank",
    "select",
    "basis",
    "tol",
    "seed",
    "task_type",
    "base_fingerprint",
    *TEXTS,
)
HEADS = {
    PeftModelForSequenceClassification: CLASSIFIERS,
    PeftModelForTokenClassification: CLASSIFIERS,
    PeftModelForQuestionAnswering: ANSWERS,
}
# whose constructors take this method of the base model
GENERATING = (PeftModelForCausalLM, PeftModelForSeq2SeqLM)
GENERATION = "prepare_inputs_for_generation"


@torch.inference_mode(False)  # what is made here is trained elsewhere
def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    is_trainable: bool = False,
) -> PeftModel:
    """Load an adapter folder that PEFT's `save_pretrained` wrote; nothing in it is trusted.

    Args:
        model: the base model, or a PEFT model with adapters of this method.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        name: the new adapter's.
        is_trainable: as in `PeftModel.from_pretrained`.

    Returns:
        The PEFT model, its config naming each layer and rank; of a base model the new adapter is active.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        AdapterError: the folder does not fit this model, is damaged, or holds values that are not finite.
        ValueError: the name is taken or can't be one, or the PEFT model is of another method.
        The model is unchanged.
    """
    folder = Path(folder)
    _check_name(model, name)
    config, heads = _read_config(folder)
    kind = type(model) if isinstance(model, PeftModel) else _kind_of(model, config, folder)
    modules = _base_modules(model)
    limit = 8 * sum(p.numel() for p in model.parameters())  # a core is no larger than its matrix
    tensors = _read_tensors(folder, limit)
    ranks = _ranks(tensors, modules, folder)
    saved = _modules_to_save(heads, kind, modules, ranks, folder)
    config.name_layers(ranks, saved)
    expected: Expected = {}
    for layer, rank in ranks.items():
        layer_rank = _rank_allowed(config, layer, modules[layer], folder)
        if layer_rank != rank:
            raise AdapterError(
                f"{folder}: {layer} has rank {rank} by its tensor and {layer_rank} by the config"
            )
        shape = delta_shape(config.core, rank, config.half_width, config.core_rank)
        expected[f"{PREFIX}{layer}{DELTA}"] = (shape, torch.float32)
        if f"{PREFIX}{layer}{SKETCH}" in tensors:
            expected[f"{PREFIX}{layer}{SKETCH}"] = ((PROBES,), torch.float32)
    for head in saved:
        for key, tensor in modules[head].state_dict().items():
            expected[f"{PREFIX}{head}.{key}"] = (tuple(tensor.shape), tensor.dtype)
    _drop_target_weights(tensors, {layer: modules[layer] for layer in ranks}, folder)
    _expect_beside(expected, tensors, model, ranks)
    check_tensors(tensors, expected, folder, ())
    check_alone(model, name, tensors)
    _check_fingerprint(config, {layer: modules[layer] for layer in ranks}, folder)

    config.inference_mode = not is_trainable
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = kind(model, config, name)
    except (ValueError, TypeError) as e:
        raise AdapterError(
            f"{folder}: the adapter does not fit this model: {excerpt(e, 400)}"
        ) from None
    try:
        set_peft_model_state_dict(model, tensors, adapter_name=name)
    except AdapterError:
        _undo(model, name, trainable)
        raise
    if is_trainable:
        model.set_requires_grad(name)
    else:
        model.eval()
    return model


def _undo(model: PeftModel, name: str, trainable: list[tuple[nn.Parameter, bool]]) -> None:
    """Take away an adapter whose bases came out otherwise, which shows when they are there."""
    if len(model.peft_config) > 1:
        model.delete_adapter(name)
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad
        return
    tuner: Any = model.base_model
    tuner.discard(name, trainable)
    for attribute in ("peft_config", "peft_type", NOTE):
        tuner.model.__dict__.pop(attribute, None)


def _check_name(model: nn.Module, name: str) -> None:
    # "." can't be in a module's name; PEFT finds tensors of an adapter by its name
    if not isinstance(name, str) or not name or "." in name or name in SpectralModel.prefix:
        raise ValueError(
            f"an adapter's name must be a string without dots that is no part of {SpectralModel.prefix!r}, "
            f"got {name!r}"
        )
    taken: Mapping[str, Any] = getattr(model, "peft_config", {})
    if name in taken or name == BASE:
        raise ValueError(f"the adapter {name!r} is there already: delete_adapter() or another name")
    if taken and not isinstance(model, PeftModel):
        raise ValueError("the model has adapters of its own: wrap a fresh base model instead")
    other = next((c.peft_type for c in taken.values() if c.peft_type != PeftType.FASTSPEC), None)
    if other is not None:
        raise ValueError(f"the model has adapters of the method {other}: one PEFT model holds one")


def _read_config(folder: Path) -> tuple[SpectralConfig, list[str]]:
    """The config without its patterns, and the ends of the names of the modules it saves."""
    path = folder / CONFIG_NAME
    if not os.path.exists(path) and os.path.exists(folder / ADAPTER_FILE):
        raise AdapterError(
            f"{folder}: a folder of fastspec's own ({ADAPTER_FILE}, but no {CONFIG_NAME}), not of PEFT: load "
            "it with fastspec.load_adapter, onto a plain or spectralized model"
        )
    data = read_bounded(path, MAX_CONFIG_BYTES)
    try:
        meta = json.loads(data)
        method = meta.get("peft_type") if isinstance(meta, dict) else None
        if isinstance(method, str) and method != PeftType.FASTSPEC.value:
            raise ValueError(
                f"an adapter of PEFT's method {method!r}, not {PeftType.FASTSPEC.value!r}: load it with "
                "peft.PeftModel.from_pretrained"
            )
        if method is None:
            raise ValueError("'peft_type' is missing: no adapter that PEFT saved")
        if meta.get("bias", "none") != "none":
            raise ValueError("it trains biases of the base model, which this loader does not touch")
        for key in TEXTS:
            if not isinstance(meta.get(key), (str, type(None))):
                raise TypeError(f"{key!r} is not a str")
        heads = meta.get("modules_to_save") or []
        # PEFT makes regular expressions of these
        if not isinstance(heads, list) or not all(
            isinstance(m, str) and re.fullmatch(r"\w[\w.]*", m) for m in heads
        ):
            raise TypeError("'modules_to_save' must list module names")
        return SpectralConfig(**{key: meta[key] for key in FIELDS if key in meta}), heads
    except (ValueError, TypeError, OverflowError, RecursionError) as e:
        raise AdapterError(f"{path}: not a usable adapter config: {excerpt(e)}") from None


def _read_tensors(folder: Path, limit: int) -> dict[str, Tensor]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not os.path.exists(path) and os.path.exists(folder / WEIGHTS_NAME):
        raise AdapterError(
            f"{folder}: {WEIGHTS_NAME} is a pickle, which can run code and is not read; expected "
            f"{SAFETENSORS_WEIGHTS_NAME}"
        )
    data = read_bounded(path, limit + MAX_HEADER_BYTES)
    try:
        return load_tensors(data)
    except Exception as e:  # what it raises depends on which of its assumptions the file breaks
        raise AdapterError(
            f"{path}: truncated, damaged or no safetensors file: {excerpt(repr(e))}"
        ) from None


def _kind_of(model: nn.Module, config: SpectralConfig, folder: Path) -> type[PeftModel]:
    """PEFT's class for the task type, whose constructor may ask methods of the base model."""
    kind: type[PeftModel] = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type), PeftModel)
    if issubclass(kind, GENERATING) and not hasattr(model, GENERATION):
        raise AdapterError(f"{folder}: this model does not do the task {config.task_type}")
    return kind


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base model's modules by name: of saved modules the pretrained ones, adapted layers as leaves."""
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        found[name] = module
        if not isinstance(module, SpectralLinear):
            for child, inner in module.named_children():
                visit(f"{name}.{child}" if name else child, inner)

    visit("", base_model_of(model))
    return found


def _ranks(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], folder: Path
) -> dict[str, int]:
    """The layers that the tensors are for, with their ranks."""
    ranks = {}
    for key, tensor in tensors.items():
        if not key.endswith(DELTA):
            continue
        layer = key.removeprefix(PREFIX).removesuffix(DELTA)
        module = modules.get(layer)
        if not key.startswith(PREFIX) or not isinstance(
            module, (nn.Linear, Conv1D, SpectralLinear)
        ):
            raise AdapterError(
                f"{folder}: the adapter does not fit this model: it adapts {excerpt(layer)}, which is no "
                "linear layer of it"
            )
        if not isinstance(module, SpectralLinear):
            try:
                check_target(layer, module, modules[layer.rpartition(".")[0]])
            except (ValueError, TypeError) as e:
                raise AdapterError(
                    f"{folder}: the adapter does not fit this model: {excerpt(e, 400)}"
                ) from None
        if tensor.dim() == 0 or math.prod(tensor.shape) == 0:
            raise AdapterError(f"{folder}: {excerpt(key)} is empty")
        ranks[layer] = tensor.shape[-1]
    if not ranks:
        raise AdapterError(f"{folder}: the adapter has no coefficients")
    return ranks


def _rank_allowed(config: SpectralConfig, layer: str, module: Any, folder: Path) -> int:
    weight = module.base_weight if isinstance(module, SpectralLinear) else module.weight
    try:
        return config.directions(layer, min(weight.shape)).rank
    except ValueError as e:
        raise AdapterError(
            f"{folder}: the adapter does not fit this model: {excerpt(e, 400)}"
        ) from None


def _modules_to_save(
    heads: list[str],
    kind: type[PeftModel],
    modules: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    folder: Path,
) -> list[str]:
    """Full names of the modules that PEFT will give copies of their own: by the ends of their names."""
    own = next((names for cls, names in HEADS.items() if issubclass(kind, cls)), ())
    ends = tuple({*heads, *own})
    saved = [name for name in modules if ends and name.endswith(ends)]
    named = (
        head for head in heads if head not in (*CLASSIFIERS, *ANSWERS)
    )  # by its user, not by PEFT
    lost = next((h for h in named if not any(name.endswith(h) for name in saved)), None)
    if lost is not None:
        raise AdapterError(f"{folder}: it saves {excerpt(lost)}, which this model does not have")
    for inner in (*saved, *ranks):
        own_name = inner in saved and inner in ranks
        outer = next((head for head in saved if own_name or inner.startswith(f"{head}.")), None)
        if outer is not None:
            raise AdapterError(
                f"{folder}: it saves {outer!r} whole and a part of it, {inner!r}, too"
            )
    return saved


def _expect_beside(
    expected: Expected, tensors: Mapping[str, Tensor], model: nn.Module, layers: Mapping[str, Any]
) -> None:
    """Add those tensors of the base that the adapter brings, which are no weight of its layers."""
    for name, tensor in base_tensors(model).items():
        owner, dot, leaf = name.removeprefix(PREFIX).rpartition(".")
        layer = owner.removesuffix(".base_layer")
        if layer in layers and leaf == "weight":
            continue
        key = f"{PREFIX}{f'{layer}.base_layer' if layer in layers else owner}{dot}{leaf}"
        if key in tensors:
            expected.setdefault(key, (tuple(tensor.shape), tensor.dtype))
    for key in tensors:
        unset = is_unset_buffer(base_model_of(model), key.removeprefix(PREFIX))
        if key not in expected and unset:
            expected[key] = None


def _drop_target_weights(
    tensors: dict[str, Tensor], layers: Mapping[str, Any], folder: Path
) -> None:
    """Take the weights of the adapted layers out, which PEFT writes of an adapted output layer.

    Raises:
        AdapterError: one is another than the model's.
    """
    for name, layer in layers.items():
        told = tensors.pop(f"{PREFIX}{name}.base_layer.weight", None)
        own = layer.base_weight if isinstance(layer, SpectralLinear) else layer.weight
        if told is not None and tensor_fingerprint(told) != tensor_fingerprint(own):
            raise AdapterError(
                f"{folder}: it holds another weight of {excerpt(name)} than this model has, from which the "
                "layer's basis is made: load the base model of the adapter"
            )


def _check_fingerprint(config: SpectralConfig, layers: Mapping[str, Any], folder: Path) -> None:
    weights = {
        name: layer.base_weight if isinstance(layer, SpectralLinear) else layer.weight
        for name, layer in layers.items()
    }
    if config.base_fingerprint is None:
        raise AdapterError(
            f"{folder}: its config has no base_fingerprint, so any weights might be its own"
        )
    prints = {name: tensor_fingerprint(weight) for name, weight in weights.items()}
    check_fingerprints(config, prints, f"{folder}: the adapter")
