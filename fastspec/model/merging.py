"""Adapted models as plain ones: merged in place, or with plain layers again."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastspec.model.passed_by import refuse_read, unwatch, warn_passed_by
from fastspec.model.targets import allow_fused_inference, spectral_layers, unwrap
from fastspec.nn import together
from fastspec.nn.layer import SpectralLayer

# what names in the state dict of a wrapped model begin with
WRAPPERS = ("", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.")


@torch.inference_mode(False)  # what is made here may be trained elsewhere
def merge(model: nn.Module) -> nn.Module:
    """Merge every adapted layer (see `SpectralLinear.merge`); `unmerge` undoes it bit for bit.

    While merged, the model's `save_pretrained` writes the merged weights, and its `state_dict` holds the base
    weights still. `merge_and_unload` makes a plain model of it.

    Raises:
        ValueError: the model has no adapter, a merged weight is not finite, or something else reads a layer's
            weight. The message names the layer; nothing is merged.
        RuntimeError: a CUDA graph is being captured.
    """
    adapted = _layers(model)
    if any(together.capturing(layer.delta) for _, layer in adapted):
        raise RuntimeError(
            "fastspec.merge looks at the weights that it made, which the capture of a CUDA graph does not "
            "allow: call it before, or fastspec.keep_merged(model), whose copies follow the coefficients "
            "in a graph too"
        )
    refuse_read((name, layer) for name, layer in adapted if bool(layer.delta.any()))
    done: list[SpectralLayer] = []
    layers = {name: layer for name, layer in adapted if not layer.merged}
    never_acted = [name for name, layer in layers.items() if layer.acted is False]
    if never_acted:  # W + U C Vh would change what reads the weight past the layer
        warn_passed_by(never_acted, "any call so far (so they stay unmerged)")
        layers = {name: layer for name, layer in layers.items() if name not in never_acted}
    for layer in layers.values():
        layer.follow_weight()
    ready = _merged_together(list(layers.values()))
    for (name, layer), effective in zip(layers.items(), ready, strict=True):
        try:
            layer.merge(effective)
        except ValueError as e:
            for other in done:
                other.unmerge()
            raise ValueError(f"{name}: {e}") from None
        done.append(layer)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put the base weights back.

    Raises:
        ValueError: the model has no adapter, or a weight was changed in place while it was merged.
    """
    layers = _layers(model)
    for _, layer in layers:
        layer.check_merged()
    for _, layer in layers:
        layer.unmerge()
    return model


def keep_merged(model: nn.Module, keep: bool = True) -> nn.Module:
    """Keep a merged copy of every adapted weight between calls (see `SpectralLinear.keep_merged`).

    The copies of a device, and those in 16 bits, are compared with the coefficients all at once, as the
    model's forward begins. Inside it, coefficients are taken to be those that it began with.

    On a GPU, in 16 bits, a layer's output may be columns of a wider matrix: it is then not contiguous, and
    code that calls `view` across its rows has to call `reshape`. docs/gpu.md says what else is done there.

    Raises:
        ValueError: the model has no adapter.
    """
    for _, layer in _layers(model):
        layer.keep_merged(keep)
    inner = unwrap(model)
    if not isinstance(inner, SpectralLayer):  # which compares for itself
        (together.install if keep else together.remove)(inner)
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Make a plain model that computes the same: adapted layers become what they were, with merged weights.

    In place, with the layers' own tensors, hooks and class. Nothing of fastspec is left on the model, which
    saves, loads, compiles and exports as any other. Parameters that were frozen stay so.

    Returns:
        The same model; of a single layer, the plain layer.

    Raises:
        ValueError: the model has no adapter, it holds tasks (`add_task`), its weights are quantised, or a
            merged weight is not finite. The message names the layer; nothing is merged.
    """
    return _unloaded(model, merged=True)


def unload(model: nn.Module) -> nn.Module:
    """Take the adapter off: plain layers with their base weights, as `merge_and_unload` otherwise.

    Heads, biases and norms that were trained keep their values.
    """
    return _unloaded(model, merged=False)


def _unloaded(model: nn.Module, merged: bool) -> nn.Module:
    wrapper, model = model, unwrap(model)
    layers = _layers(model)
    if getattr(model, "task_bank", None) is not None:
        raise ValueError(
            "the model holds tasks, which a plain model can't: set_task(model, name), save_adapter(model, "
            "folder), then load_adapter(base, folder) into a fresh base model and call this with it"
        )
    merge(model) if merged else unmerge(model)
    plain = {id(layer): layer.unload(merged and layer.acted is not False) for _, layer in layers}
    for layer in plain.values():
        rehook(layer)
    allow_fused_inference(model)
    together.remove(model)
    unwatch(model)
    for module in model.modules():
        module.__dict__.pop("save_pretrained", None)
    model.__dict__.pop("spectral", None)
    if id(model) in plain:
        return plain[id(model)]
    replace_modules(model, plain)
    return wrapper


def _layers(model: nn.Module) -> list[tuple[str, SpectralLayer]]:
    """The adapted layers, of which there have to be some: to do nothing would look like success."""
    layers = list(spectral_layers(model))
    if not layers:
        if hasattr(model, "peft_config"):
            raise ValueError(
                "the adapters of this model are PEFT's: call its own methods (merge_adapter, "
                "unmerge_adapter, merge_and_unload, unload)"
            )
        raise ValueError("the model has no adapter: call fastspec.spectralize(model, config) first")
    return layers


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put modules in the places of those with these ids, wherever in the model they are."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new:
                parent._modules[name] = new[id(child)]


def rehook(layer: nn.Module) -> None:
    """Move accelerate's hook, whose forward on the instance would go on calling the former layer."""
    hook = layer.__dict__.pop("_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        del layer.__dict__["forward"], layer.__dict__["_old_forward"]
        add_hook_to_module(layer, hook)


def write_merged(model: nn.Module) -> None:
    """Let `save_pretrained`, of the model and of models inside it, write merged weights while merged."""
    for module in model.modules():
        if callable(getattr(type(module), "save_pretrained", None)):
            module.__dict__["save_pretrained"] = functools.partial(_save_pretrained, module)


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The `save_pretrained` of a model's class, given the state of the plain merged model while merged.

    Raises:
        ValueError: layers are merged, others are not, or the method takes no state dict.
    """
    save = type(model).save_pretrained
    layers = list(spectral_layers(model))
    if layers and not any(layer.merged for _, layer in layers):
        from fastspec.model.pretrained import save_adapter_beside  # which needs this module

        result = save(model, *args, **kwargs)
        _, folder, *_ = inspect.signature(save).bind(model, *args, **kwargs).arguments.values()
        if kwargs.get("is_main_process", True):
            save_adapter_beside(model, folder)
        return result
    if any(layer.merged for _, layer in spectral_layers(model)):
        signature = inspect.signature(save)
        if "state_dict" in signature.parameters:
            given = signature.bind(model, *args, **kwargs)
            given.arguments["state_dict"] = _merged_state(model, given.arguments.get("state_dict"))
            return save(*given.args, **given.kwargs)
        if not _written_inside(model):
            raise ValueError(
                f"{type(model).__name__}.save_pretrained would write the base weights of a merged model: "
                "call fastspec.merge_and_unload(model) first"
            )
    return save(model, *args, **kwargs)


def _written_inside(model: nn.Module) -> bool:
    """Whether models inside this one, which save themselves, hold all of its adapted layers."""
    inside = {
        id(layer)
        for module in model.modules()
        if module is not model and "save_pretrained" in vars(module)
        for _, layer in spectral_layers(module)
    }
    return all(id(layer) in inside for _, layer in spectral_layers(model))


def _merged_state(model: nn.Module, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The state dict of the plain merged model, from one of the model as it is, perhaps of a wrapper."""
    state = dict(model.state_dict() if given is None else given)
    layers = list(spectral_layers(model))
    lead = next((w for w in WRAPPERS if f"{w}{layers[0][0]}.delta" in state), None)
    if lead is None:
        raise ValueError(
            f"the state dict to save lacks {layers[0][0]}.delta, as that of an adapted model has it: leave "
            "it out, or call fastspec.merge_and_unload(model) first"
        )
    for name, layer in layers:
        if not layer.merged and layer.acted is not False:
            raise ValueError(
                f"{name} is not merged, other layers are: fastspec.merge(model) or fastspec.unmerge(model) "
                "first"
            )
        state.pop(f"{lead}{name}.delta", None)
        if f"{lead}{name}.weight" in state:
            state[f"{lead}{name}.weight"] = layer.weight.detach()
    return state


def _merged_together(layers: list[SpectralLayer]) -> list[Tensor | None]:
    """Merged weights of the layers on a GPU, one launch for each kind; None where a layer makes its own."""
    # a quantised weight is a subclass, and its layer says why it can't be merged
    on_gpu = [m for m in layers if m.weight.is_cuda and type(m.weight.data) is Tensor]
    if not on_gpu or importlib.util.find_spec("triton") is None:
        return [None] * len(layers)
    from fastspec.kernels.merge import merge_layers

    with torch.no_grad():
        merged = merge_layers(
            [layer._matrix(layer.weight) for layer in on_gpu],
            [layer.u for layer in on_gpu],
            [layer.vh for layer in on_gpu],
            [layer.delta for layer in on_gpu],
            [layer.core for layer in on_gpu],
        )
    # `_matrix` undoes itself: the identity, or a transposition
    found = {
        id(layer): None if w is None else layer._matrix(w)
        for layer, w in zip(on_gpu, merged, strict=True)
    }
    return [found.get(id(layer)) for layer in layers]
