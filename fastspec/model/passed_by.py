"""Adapted layers that a model passes by: their parent reads `child.weight` and never calls the child.

WavLM's attention does so, Mamba's `dt_proj`, and whatever computes `F.linear(x, self.q.weight)`: coefficients
then train nothing, and merging them would change what the model computes.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class FirstCalls:
    """Looks at a model's first call in training and its first otherwise, which may take other paths.

    A layer whose parent ran and which did not gets `acted = False`, one that ran `acted = True`. A parent
    that did not run (an expert without rows) says nothing of its layers. Compiled calls are not looked at.

    Args:
        layers: the adapted layers of the model by name, as they are when it is called.
    """

    def __init__(self, layers: Callable[[nn.Module], Mapping[str, nn.Module]]) -> None:
        self.layers = layers
        self.seen: set[bool] = set()
        self._looking: tuple[int, set[int], list[RemovableHandle]] | None = None

    def watch(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def leave(self, model: nn.Module) -> None:
        """Take the hooks off again."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]

    def _before(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self._mode(model) in self.seen:
            return
        if self._looking is not None:  # a call that failed, or one of another thread
            for handle in self._looking[2]:
                handle.remove()
        ran = {id(model)}
        layers = {id(layer) for layer in self.layers(model).values()}
        if not layers:  # the adapter was taken off
            self.leave(model)
            return
        watched = [m for m in model.modules() if id(m) in layers or _has_any(m, layers)]
        note = _Note(ran)
        handles = [module.register_forward_pre_hook(note) for module in watched]
        self._looking = threading.get_ident(), ran, handles

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._looking is None:
            return
        thread, ran, handles = self._looking
        if thread != threading.get_ident():
            return
        self._looking = None
        for handle in handles:
            handle.remove()
        mode = self._mode(model)
        self.seen.add(mode)
        if len(self.seen) == 2:
            self.leave(model)
        layers = self.layers(model)
        called_parents = [m for m in model.modules() if id(m) in ran]
        passed = []
        for name, layer in layers.items():
            state: Any = layer
            if id(layer) in ran:
                state.acted = True
            elif any(child is layer for m in called_parents for child in m._modules.values()):
                passed.append(name)
                if state.acted is None:
                    state.acted = False
        if passed:
            warn_passed_by(passed, "training" if mode else "inference")

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


class _Note:
    """A hook that notes which modules ran."""

    def __init__(self, ran: set[int]) -> None:
        self.ran = ran

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.ran.add(id(module))


def _has_any(module: nn.Module, ids: set[int]) -> bool:
    return any(id(child) in ids for child in module._modules.values())


def warn_passed_by(names: list[str], when: str) -> None:
    """Name the layers; `when` says in which kind of call they were passed by."""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    warnings.warn(
        f"{shown}: adapted, but not called in {when}: the module around reads the weight itself. There the "
        "coefficients have no effect and get no gradient; layers that never acted are not merged. Leave them "
        "out (exclude_modules)",
        stacklevel=3,
    )
