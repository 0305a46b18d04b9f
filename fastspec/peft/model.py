"""The tuner PEFT drives: it wraps the target layers and gives them their bases."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import mapping
from peft.tuners.tuners_utils import (
    BaseTuner,
    _maybe_include_all_linear_layers,
    delete_adapter,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastspec.fingerprint import combined_fingerprint, tensor_fingerprint
from fastspec.model.adapter_file import AdapterError
from fastspec.model.passed_by import FirstCalls
from fastspec.model.targets import avoid_fused_inference, check_layer
from fastspec.peft.config import PeftType, SpectralConfig
from fastspec.peft.layer import BASE, SpectralLinear
from fastspec.peft.state import BaseWeights, FrozenBasis
from fastspec.svd.factors import factorize


class SpectralModel(BaseTuner):
    """A model whose target layers are `fastspec.peft.layer.SpectralLinear`; made by `get_peft_model`."""

    prefix = "fastspec_"
    tuner_layer_cls = SpectralLinear

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter: wrap its layers, factorise what has no basis yet, layers of a shape together.

        Raises:
            ValueError, TypeError: as `fastspec.spectralize`; the message names the layer.
            AdapterError: the config is a saved adapter's, and that was made from other base weights.
            Whatever is raised, the model computes what it did before.
        """
        # the caller's config stays as it is, for use with other models
        config = copy.deepcopy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        try:
            super().inject_adapter(
                model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
            )
            self._make_bases(adapter_name, config)  # type: ignore[arg-type]
            avoid_fused_inference(model)
            if len(self.peft_config) == 1:
                FirstCalls(_layers_by_name).watch(self)
                FirstCalls(_layers_by_name).watch(self.model)  # some of PEFT's models call this one
        except Exception:
            if len(self.peft_config) == 1:
                for module in model.modules():
                    if isinstance(module, AuxiliaryTrainingWrapper):
                        module.set_adapter([])  # unload then puts the original back, not the copy
                self.unload()
            else:
                del self.peft_config[adapter_name]
                delete_adapter(model, adapter_name, self.prefix, SpectralLinear)
            for parameter, requires_grad in trainable:
                parameter.requires_grad = requires_grad
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules in (None, "all-linear"):
            peft_config.target_modules = "all-linear"
            _maybe_include_all_linear_layers(peft_config, self.model)
            attentions = [
                name
                for name, module in self.model.named_modules()
                if isinstance(module, nn.MultiheadAttention)
            ]
            # which read its weight without calling it
            peft_config.target_modules -= {f"{name}.out_proj" for name in attentions}
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SpectralLinear):
            layer = target
        else:
            check_target(current_key, target, parent)
            layer = SpectralLinear(target)
        short_side = min(layer.base_matrix().shape)
        k = peft_config.directions(current_key, short_side).rank
        layer.add_coefficients(adapter_name, peft_config.core, k, peft_config.half_width)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _make_bases(self, adapter_name: str, config: SpectralConfig) -> None:
        """Give every layer of the adapter its factors, and check or note the base weights' fingerprint."""
        layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, SpectralLinear) and adapter_name in layer.fastspec_delta
        }
        wanted = {
            name: config.directions(name, min(layer.base_matrix().shape))
            for name, layer in layers.items()
        }
        fingerprints = {}
        missing: dict[tuple, list[str]] = {}  # layers that share a weight share its factors
        for name, layer in layers.items():
            basis = layer.shared_basis(wanted[name])
            if basis is not None:
                fingerprints[name] = basis.fingerprint
                layer.use_basis(adapter_name, config.core, basis, wanted[name])
            else:
                fingerprints[name] = tensor_fingerprint(layer.base_weight)
                w = layer.base_matrix()
                key = (w.data_ptr(), tuple(w.shape), w.stride(), wanted[name])
                missing.setdefault(key, []).append(name)
        fingerprint = combined_fingerprint(fingerprints)
        if config.base_fingerprint not in (None, fingerprint):
            made_from = config.base_model_name_or_path
            raise AdapterError(
                f"the adapter {adapter_name!r} was made from other base weights"
                f"{f' ({made_from})' if made_from else ''}; coefficients only mean something in the basis "
                "of their own model: load that one, in the same dtype (or, to start a new adapter by this "
                "config, set its base_fingerprint to None)"
            )
        config.base_fingerprint = fingerprint
        told = BaseWeights(config, fingerprints)

        first = [names[0] for names in missing.values()]
        made = factorize(
            [layers[name].base_matrix() for name in first],
            [wanted[name] for name in first],
            first,
            progress=None,
        )
        for names, factors in zip(missing.values(), made, strict=True):
            basis = FrozenBasis(factors, wanted[names[0]], fingerprints[names[0]])
            for name in names:
                layers[name].use_basis(adapter_name, config.core, basis, wanted[name])
        for name, layer in layers.items():
            layer.follow(adapter_name, told, name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Serve PEFT's argument `adapter_names`: one adapter a row, `"__base__"` for none.

        Raises:
            ValueError: in training mode, as PEFT's own methods do, or for a name that no layer has.
        """
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(names) - {BASE, *self.peft_config}
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}"
            )
        beams = kwargs.get("num_beams") or 1
        encoder: Any = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # beam search repeats every row, except before the encoder of an encoder-decoder model
        once = set() if encoder is None or encoder is self.model else set(encoder.modules())
        repeated = [name for name in names for _ in range(beams)]
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, (SpectralLinear, AuxiliaryTrainingWrapper)):
                    rows = list(names) if module in once else repeated
                    hook = functools.partial(_with_adapter_names, adapter_names=rows)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _layers_by_name(model: nn.Module) -> dict[str, SpectralLinear]:
    return {
        n.removeprefix("model."): m
        for n, m in model.named_modules()
        if isinstance(m, SpectralLinear)
    }


def register() -> None:
    """Enter the method into PEFT's tables."""
    tables: list[tuple[dict, Any]] = [
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, SpectralConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, SpectralModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, SpectralModel.prefix),
    ]
    for table, value in tables:
        table[PeftType.FASTSPEC] = value


def _with_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]
) -> tuple[tuple, dict]:
    return args, kwargs | {"adapter_names": adapter_names}


def check_target(name: str, target: nn.Module, parent: nn.Module) -> None:
    """Refuse what the layer can't stand in for."""
    if not isinstance(target, (nn.Linear, Conv1D)):
        raise TypeError(
            f"{name}: {type(target).__name__} is not supported, only nn.Linear and transformers' Conv1D "
            "are: leave it out of target_modules"
        )
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{name}: nn.MultiheadAttention reads this layer's weight without calling it, so it can't be "
            "adapted: name it in exclude_modules"
        )
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(vars(target)[kind] for kind in hooks) or "forward" in vars(target):
        raise ValueError(
            f"{name}: the layer has forward hooks or a forward of its own (offloading, weight norm, or the "
            "user's), or backward hooks, which an adapted layer does not run: remove them, or name it in "
            "exclude_modules"
        )
    check_layer(name, target)
