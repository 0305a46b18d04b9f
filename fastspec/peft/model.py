"""The tuner PEFT drives: it wraps the target layers and gives them their bases."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner, delete_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fastspec.cores import delta_shape
from fastspec.files import excerpt
from fastspec.fingerprint import tensor_fingerprint
from fastspec.model.adapter_file import AdapterError
from fastspec.model.buffers import DIGITS
from fastspec.model.convert import warn_of_stacks
from fastspec.model.passed_by import FirstCalls, refuse_read, unwatch
from fastspec.model.targets import avoid_fused_inference
from fastspec.peft.beside import (
    changed_beside,
    check_alone,
    check_sketches,
    fill_buffers,
    note_brought,
    note_buffers,
    sketches,
)
from fastspec.peft.config import ALL_LINEAR, PeftType, SpectralConfig
from fastspec.peft.layer import BASE, SpectralLinear
from fastspec.peft.state import BaseWeights, FrozenBasis
from fastspec.peft.targets import (
    check_names,
    check_target,
    is_all_linear,
    lower_ranks,
    meant,
    resolve_all_linear,
    resolve_heads,
)
from fastspec.peft.weighted import sum_into, summed_config
from fastspec.svd.factors import factorize


class SpectralModel(BaseTuner):
    """A model whose target layers are `fastspec.peft.layer.SpectralLinear`; made by `get_peft_model`."""

    prefix = "fastspec_"
    tuner_layer_cls = SpectralLinear

    @torch.inference_mode(False)  # what is made here is trained elsewhere
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
        config: Any = self.peft_config[adapter_name]
        config = self.peft_config[adapter_name] = config.for_new_adapter()
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        if not any(isinstance(module, SpectralLinear) for module in model.modules()):
            note_buffers(model)
        try:
            with config.resolving():
                everywhere = is_all_linear(config)
                if state_dict is None:
                    check_names(config, model)
                super().inject_adapter(
                    model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
                )
                self._make_bases(adapter_name, config)
            avoid_fused_inference(model)
            if len(self.peft_config) == 1:
                FirstCalls(_layers_by_name).watch(self)
                FirstCalls(_layers_by_name).watch(self.model)  # some of PEFT's models call this one
        except BaseException:
            self.discard(adapter_name, trainable)
            raise
        by_pattern = everywhere or isinstance(config.target_modules, str)
        if by_pattern and len(self.peft_config) == 1:
            warn_of_stacks(model, ALL_LINEAR if everywhere else config.target_modules)

    def discard(self, adapter_name: str, trainable: list[tuple[nn.Parameter, bool]]) -> None:
        """Take an adapter away again; parameters get the flags of `trainable` back."""
        if len(self.peft_config) == 1:
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.set_adapter([])  # unload then puts the original back, not the copy
            self.unload()
            unwatch(self.model)
        else:
            del self.peft_config[adapter_name]
            delete_adapter(self.model, adapter_name, self.prefix, SpectralLinear)
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        resolve_heads(peft_config, self.model)
        if is_all_linear(peft_config):
            resolve_all_linear(peft_config, self.model)
            lower_ranks(peft_config, self.model)
        elif isinstance(peft_config.target_modules, str):
            lower_ranks(peft_config, self.model)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return meant(peft_config, key)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a module in the place of another.

        PEFT's own hands the weight on as well, which layers and heads here have already, and which a head
        of several layers does not have.
        """
        setattr(parent, child_name, new_module)

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
        shape = delta_shape(peft_config.core, k, peft_config.half_width, peft_config.core_rank)
        layer.add_coefficients(adapter_name, shape)
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
        check_fingerprints(config, fingerprints, f"the adapter {adapter_name!r}")
        config.base_fingerprint = {name: digest[:DIGITS] for name, digest in fingerprints.items()}
        config = self.peft_config[adapter_name] = config.settled()  # type: ignore[assignment]
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

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What PEFT saves: the adapter's tensors, and those of the base that are trained or moved beside."""
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        beside = {name: state_dict[name] for name in changed_beside(model)}
        return beside | found | sketches(model, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """What PEFT loads, checked before it is put into the model."""
        check_alone(model, adapter_name, state_dict)
        check_sketches(model, adapter_name, state_dict)
        note_brought(model, state_dict)
        fill_buffers(model, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        refuse_read(_layers_by_name(self.model).items())

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter that does what the given ones do together, each times its weight.

        It is inactive at first. Modules to save are taken along, where only one of the adapters has them.

        Raises:
            ValueError: the sum would not be exact (other core, basis or rank; two heads for one module;
                trained biases), the name is taken, or another way of combining is asked for.
        """
        if combination_type != "linear":
            raise ValueError(
                f"combination_type={combination_type!r}: only 'linear' is there, which is exact for "
                "adapters in one basis; others approximate a sum of different low-rank products"
            )
        if adapter_name in self.peft_config:
            raise ValueError(
                f"the adapter {adapter_name!r} is there already: delete_adapter() it first"
            )
        configs: Any = self.peft_config
        config = summed_config(self.model, configs, adapters, weights)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        sum_into(self.model, adapter_name, adapters, weights)

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


def check_fingerprints(config: SpectralConfig, have: Mapping[str, str], whose: str) -> None:
    """Compare the weights of an adapter's layers with those it was made from, if the config names them.

    Raises:
        AdapterError: a weight differs, or only one of both has the layer; the message names it.
    """
    told = config.base_fingerprint
    if told is None:
        return
    names = sorted(have.keys() | told.keys())
    differing = [n for n in names if have.get(n, "")[:DIGITS] != told.get(n)]
    if differing:
        made_from = config.base_model_name_or_path
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        base = f"other base weights{f' ({excerpt(made_from)})' if made_from else ''}"
        raise AdapterError(
            f"{whose} was made from {base}, or lacks tensors of some of its layers: not the same are "
            f"{excerpt(differing[0])}{more} of {len(names)}; coefficients "
            "only mean something in the basis of their own model: load that one, in the same dtype (or, to "
            "start a new adapter by this config, set its base_fingerprint to None)"
        )
