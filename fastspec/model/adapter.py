"""Adapter folders: `save_adapter` and `load_adapter`, some KB a task.

The tensors are the coefficients, the heads, whatever else `spectralize` made trainable, and what was
trained or moved beside it: parameters unfrozen by hand, running statistics. The config holds the
`SpectralConfig` and a digest of every other tensor of the model: the base, from whose weights the factors are
rebuilt.

A folder may come from anybody. It holds no code and no patterns: the config names its layers and heads
one by one (a regular expression can be made to run for years), names only ever select modules the model
has, and no file is read before its size was compared with what this model can use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastspec
from fastspec.files import excerpt
from fastspec.model.adapter_basis import Adapters, bases_of, basis_tensors, expected_bases
from fastspec.model.adapter_file import AdapterError, Expected, open_adapter, write_adapter
from fastspec.model.adapter_fit import (
    FIELDS,
    check_same_config,
    check_same_layers,
    config_of,
    expected_state,
    expected_tensors,
    targets_of,
)
from fastspec.model.base import Base
from fastspec.model.buffers import fill_buffer, is_extra_state
from fastspec.model.convert import Adaptation, adaptation, adapted_part
from fastspec.model.file_names import FileNames, in_file
from fastspec.model.fsdp import assign, is_sharded, reshard, whole
from fastspec.model.targets import Target, is_norm, spectral_layers, unwrap
from fastspec.nn.layer import SpectralLayer


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], *, bases: bool = False) -> Path:
    """Write what is trained in `model` to `folder`, atomically: one file is replaced.

    That is what `spectralize` made trainable, every other parameter that requires a gradient now, and the
    persistent buffers that changed since, as the running statistics of a BatchNorm in train mode. A model
    sharded by FSDP2 is gathered: every process must call this, the first one writes.

    Args:
        model: a spectralized one.
        folder: made where there is none.
        bases: write the bases too, k (in + out) numbers a layer, so that nothing is factorised on loading
            and the adapter means the same everywhere. Without them they are made again there, and where
            they come out otherwise, as between tied singular values, loading refuses.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not a spectralized one, a value to save is not finite, or the weight of an
            adapted layer is trained or has changed since the last call, and its basis is made from it.
    """
    model = unwrap(model)
    adapted = adaptation_of(model)
    reshard(model)
    base = Base(model)
    base.check_bases(_refuse_other_basis)
    own = adapter_tensors(model)
    state = base.changed(own, adapted.buffers)
    own |= {name: base.tensors[name] for name in state}
    written = own | basis_tensors(model, bases)
    tensors = _apart({in_file(n): whole(t.detach()).cpu().contiguous() for n, t in written.items()})
    bad = next((name for name, t in tensors.items() if not bool(torch.isfinite(t).all())), None)
    if bad is not None:
        raise ValueError(f"{bad} holds NaN or infinity: nothing was written")
    folder = Path(folder)
    fields = adapted.config.to_dict()
    config = {
        "fastspec_version": fastspec.__version__,
        "base_model": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        **base.describe(own),
        "modules_to_save": [in_file(name) for name in adapted.modules_to_save],
        "state": [in_file(name) for name in state],
        "bases": bases,
        "layers": {in_file(name): layer.rank for name, layer in spectral_layers(model)},
        "spectral": {name: fields[name] for name in FIELDS},
    }
    sharded = any(map(is_sharded, own.values()))
    if not sharded or torch.distributed.get_rank() == 0:
        write_adapter(folder, tensors, config)
    if sharded:
        torch.distributed.barrier()  # whoever returns may read
    return folder


@torch.inference_mode(False)  # what is made here is trained elsewhere
def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, strict: bool = True
) -> nn.Module:
    """Put a saved adapter into `model`, in place.

    Of a model sharded by FSDP2 every process must call this.

    Args:
        model: the plain base model, which is then spectralized by the adapter's own config, or one that
            was spectralized alike: then the values are copied into the existing tensors. Embeddings may
            have more rows than the adapter's base had. Heads that the adapter does not hold may differ,
            with a warning.
        folder: of `save_adapter`.
        strict: False lets every other tensor of the base differ too, with a warning, but for those of
            layers with coefficients that are not zero.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: there is no adapter.
        AdapterError: a damaged file, a folder of PEFT, other base weights, another rank or kind of core,
            heads of another size, values that are not finite, bases that come out otherwise here. The
            model is unchanged.
    """
    wrapper, model = model, unwrap(model)
    reshard(model)
    found = read_adapters(model, [folder], strict=strict)
    (tensors,) = found.tensors
    if next(spectral_layers(model), None) is None:
        spectralize_for(model, found, folder)
    elif found.bases and not hasattr(model, "task_bank"):
        found.hold_bases(model)
    own, base = adapter_tensors(model), Base(model).tensors
    for name, value in tensors.items():
        if name in own:
            assign(own[name], value)
            continue
        if name not in base:
            fill_buffer(model, name, value)
            continue
        assign(base[name], value)
        if isinstance(base[name], nn.Parameter):
            base[name].requires_grad_(True)
    return wrapper


def read_adapters(
    model: nn.Module,
    folders: Sequence[str | os.PathLike[str]],
    sizes_free: Callable[[Sequence[str]], Collection[str]] | None = None,
    strict: bool = True,
) -> Adapters:
    """Read adapter folders and check each against `model`, which is plain or adapted alike.

    Nothing is changed. The base weights are fingerprinted once. The bases of a plain model are compared
    when it is adapted (`spectralize_for`).

    Args:
        sizes_free: for adapters that share the model: from the names of the heads, the names of the
            tensors whose first dimension may differ from the model's: those of their output layers.
        strict: as in `load_adapter`.

    Raises:
        FileNotFoundError, AdapterError: as `load_adapter`; also folders of different configs.
    """
    found: Adapters | None = None
    expected: Expected | None = None
    targets: list[Target] = []
    adapted = next(spectral_layers(model), None) is not None
    if adapted:
        found = Adapters(adaptation_of(model).config)
        expected = {n: (t.shape, t.dtype) for n, t in adapter_tensors(model).items()}
    # neither a core nor two bases are larger than twice their matrix, whatever a folder says
    limit = 32 * sum(p.numel() for p in model.parameters())
    free: Collection[str] = ()
    base = Base(model)
    base.check_bases(_remake_basis)
    names = FileNames(model)
    told: dict[str, Any] = {}
    for folder in map(Path, folders):
        with open_adapter(folder) as file:
            meta = names.config(file.meta)
            saying = {key: meta[key] for key in ("spectral", "layers", "modules_to_save", "bases")}
            if saying != told:  # of a thousand folders nearly all say the same
                own = config_of(meta, model, folder)
                found = found or Adapters(own)
                if expected is None:
                    targets, heads = targets_of(model, own, folder, meta["bases"])
                    expected = expected_tensors(model, own, targets, heads)
                check_same_config(found.config, own, folder)
                if adapted:
                    check_same_layers(model, meta["layers"], folder)
                if sizes_free is not None:
                    free = sizes_free(meta["modules_to_save"])
                told = saying
            assert found is not None
            assert expected is not None
            state = expected_state(meta, model, base.tensors, folder)
            if state and sizes_free is not None:
                raise AdapterError(
                    f"{folder}: it holds {excerpt(meta['state'][0])}, of which a model has one for all its "
                    "tasks: load_adapter() it into a model of its own"
                )
            bases = expected_bases(model, targets, meta)
            wanted = {in_file(n): what for n, what in (expected | state | bases).items()}
            tensors = names.tensors(file.tensors(wanted, limit, set(map(in_file, free))))
        used = None if strict else [n for n in meta["layers"] if bool(tensors[f"{n}.delta"].any())]
        base.check(meta, tensors, folder, used)
        found.add(folder, meta, tensors)
    assert found is not None, "read_adapters needs at least one folder"
    alone = sizes_free is None and not hasattr(model, "task_bank")
    if adapted and not (alone and found.bases):
        found.check(bases_of(model))
    return found


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with tied tensors copied, which a file can't share."""
    seen = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        if place in seen:
            tensors[name] = tensor.clone()
        seen.add(place)
    return tensors


def spectralize_for(model: nn.Module, adapters: Adapters, folder: str | os.PathLike[str]) -> None:
    """Adapt a plain model by what `read_adapters` found; an AdapterError names the folder.

    Raises:
        AdapterError: the model can't be adapted so, or its bases are others than an adapter's. It is
            unchanged.
    """
    try:
        adapters.convert(model)
    except AdapterError:
        raise
    except (ValueError, TypeError) as e:
        raise AdapterError(
            f"{folder}: the adapter does not fit this model: {excerpt(e, 400)}"
        ) from None


def adaptation_of(model: nn.Module) -> Adaptation:
    found = adaptation(model)
    if found is not None:
        return found
    inner = adapted_part(model)
    if inner is not None:
        raise ValueError(
            f"the model itself has no adapter, but its part {inner!r} has: pass that (model.{inner})"
        )
    raise ValueError("the model has no adapter: call fastspec.spectralize(model, config) first")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name to tensor (the model's own) of everything an adapter holds."""
    adapted = adaptation_of(model)
    config = adapted.config
    tensors: dict[str, Tensor] = {}
    for name, layer in spectral_layers(model):
        tensors[f"{name}.delta"] = layer.delta
        if config.train_bias and layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    if config.train_layernorm:
        for name, module in model.named_modules():
            if is_norm(module):
                tensors |= {f"{name}.{n}": p for n, p in module.named_parameters(recurse=False)}
    for head in adapted.modules_to_save:
        state = model.get_submodule(head).state_dict(keep_vars=True)
        tensors |= {f"{head}.{n}": t for n, t in state.items() if not is_extra_state(n)}
    return tensors


def _refuse_other_basis(name: str, layer: SpectralLayer) -> None:
    raise ValueError(
        f"{name}.weight has changed since its factors were made, past the count of its writes (as by "
        "weight.data) or since the last call: put it back, or call the layer's refactorize(), which gives "
        "the coefficients another basis; nothing was written"
    )


def _remake_basis(name: str, layer: SpectralLayer) -> None:
    layer.refactorize()
