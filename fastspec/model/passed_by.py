"""Adapted layers that a model passes by: their parent reads `child.weight` and never calls the child.

WavLM's attention does so, Mamba's `dt_proj`, and whatever computes `F.linear(x, self.q.weight)`: coefficients
then train nothing, and merging them would change what the model computes. A layer may be called and read.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastspec.model.weight_reads import WeightReads, has_compiled_part
from fastspec.nn.parts import calls_running


class FirstCalls:
    """Looks at a model's first call in training and its first otherwise, which may take other paths.

    A layer that ran gets `acted = True`. One that did not gets `acted = False`, if its weight was read or its
    parent ran. A parent that did not run (an expert without rows) says nothing of its layers. One that ran
    and was read besides gets `read = True`. Compiled calls are not looked at.

    Args:
        layers: the adapted layers of the model by name, as they are when it is called.
    """

    def __init__(self, layers: Callable[[nn.Module], Mapping[str, nn.Module]]) -> None:
        self.layers = layers
        self.seen: set[bool] = set()
        self._looking: _Look | None = None

    def watch(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after, always_call=True)

    def leave(self, model: nn.Module) -> None:
        """Take the hooks off again."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)

    def _before(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self._mode(model) in self.seen:
            return
        if self._looking is not None:
            if calls_running(model) > 1:
                return  # of the call that is looked at
            self._looking.end()  # an interrupted call, or one of another thread
        by_name = self.layers(model)
        if not by_name:  # the adapter was taken off
            self.leave(model)
            return
        self._looking = _Look(model, by_name)

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._looking is None:
            return
        look = self._looking
        if look.thread != threading.get_ident() or calls_running(model) > 1:
            return
        self._looking = None
        look.end()
        if output is None:  # the call failed
            return
        ran, read = look.ran, look.reads.names
        mode = self._mode(model)
        self.seen.add(mode)
        if len(self.seen) == 2:
            self.leave(model)
        layers = self.layers(model)
        called_parents = [m for m in model.modules() if id(m) in ran]
        passed, shared = [], []
        for name, layer in layers.items():
            state: Any = layer
            if id(layer) in ran:
                state.acted = True
                if name in read:
                    state.read = True
                    shared.append(name)
            elif name in read or any(
                child is layer for m in called_parents for child in m._modules.values()
            ):
                passed.append(name)
                if state.acted is None:
                    state.acted = False
        if passed:
            warn_passed_by(passed, "training" if mode else "inference")
        if shared:
            warnings.warn(
                f"{listed(shared)}: something else reads the weight of this layer, past its forward. It "
                "sees the base weight, and the layer can't be merged. Leave it out (exclude_modules)",
                stacklevel=3,
            )

    @staticmethod
    def _mode(model: nn.Module) -> bool:
        return model.training and torch.is_grad_enabled()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "seen": set(self.seen), "_looking": None}


def unwatch(model: nn.Module) -> None:
    """Take the hooks of every `FirstCalls` off a model."""
    for hook in list(model._forward_hooks.values()):
        if isinstance(watcher := getattr(hook, "__self__", None), FirstCalls):
            watcher.leave(model)


class _Look:
    """One call that is looked at: which of the layers and their parents run, and whose weights are read."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.thread = threading.get_ident()
        self.ran = {id(model)}
        self.reads = WeightReads(model, layers)
        ids = {id(layer) for layer in layers.values()}
        self._handles = [
            module.register_forward_pre_hook(self._note)
            for module in model.modules()
            if id(module) in ids or _has_any(module, ids)
        ]
        if not has_compiled_part(model):
            self._handles += self.reads.begin()

    def _note(self, module: nn.Module, args: Any) -> None:
        self.ran.add(id(module))

    def end(self) -> None:
        self.reads.end()
        for handle in self._handles:
            handle.remove()


def _has_any(module: nn.Module, ids: set[int]) -> bool:
    return any(id(child) in ids for child in module._modules.values())


def refuse_read(layers: Iterable[tuple[str, Any]]) -> None:
    """What reads a layer's weight past it would see the merged one.

    Raises:
        ValueError: a layer to be merged has acted and is read besides; the message names it.
    """
    for name, layer in layers:
        if layer.read:
            raise ValueError(
                f"{name} can't be merged: something else reads its weight, past the layer's forward, and "
                "would see the merged one; leave it out (exclude_modules)"
            )


def listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def warn_passed_by(names: list[str], when: str) -> None:
    """Name the layers; `when` says in which kind of call they were passed by."""
    warnings.warn(
        f"{listed(names)}: adapted, but not called in {when}: the module around reads the weight itself. "
        "There the coefficients have no effect and get no gradient; layers that never acted are not merged. "
        "Leave them out (exclude_modules)",
        stacklevel=3,
    )
