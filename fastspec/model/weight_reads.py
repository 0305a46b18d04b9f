"""Weights of adapted layers that something else reads: it sees the base weight, and would see merged ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.hooks import RemovableHandle


class WeightReads(TorchFunctionMode):
    """While it is on, notes the layers whose weight is an operand outside their own forward.

    A weight that a module other than the layers holds too (a tied embedding) is not looked at: merging
    leaves that module the base weight. Nor are reads of dtype, shape or device.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names: set[str] = set()  # of the layers
        self._on = False
        self._inside: list[nn.Module] = []  # the layers that run now
        self._owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, layer in layers.items():
            for parameter in _weights(layer):
                self._owners.setdefault(id(parameter), []).append((name, layer))
        parts = {id(part) for layer in layers.values() for part in layer.modules()}
        for module in model.modules():
            if id(module) not in parts:
                for held in module._parameters.values():
                    self._owners.pop(id(held), None)

    def begin(self) -> list[RemovableHandle]:
        """Look from here on; returns the handles of the hooks that say which layer runs."""
        layers = {id(layer): layer for owners in self._owners.values() for _, layer in owners}
        handles = []
        for layer in layers.values():
            handles.append(layer.register_forward_pre_hook(self._enter))
            handles.append(layer.register_forward_hook(self._leave, always_call=True))
        self.__enter__()
        self._on = True
        return handles

    def end(self) -> None:
        """Look no longer."""
        self._on = False
        if (
            _get_current_function_mode() is self
        ):  # else it was left on by an interrupt: it only passes on
            self.__exit__(None, None, None)

    def _enter(self, layer: nn.Module, args: Any) -> None:
        self._inside.append(layer)

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._inside:
            self._inside.pop()

    def __torch_function__(
        self, func: Callable, types: Any, args: Iterable = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._on and _has_tensor((result,)):
            for operand in _flat((*args, *kwargs.values())):
                owners = self._owners.get(id(operand), ())
                if owners and not any(layer in self._inside for _, layer in owners):
                    self.names.update(name for name, _ in owners)
        return result


def has_compiled_part(model: nn.Module) -> bool:
    """Whether a part of the model is compiled, which would be compiled again for the mode."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in layer.named_parameters() if n.rpartition(".")[2] == "weight"]


def _flat(values: Iterable) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _has_tensor(values: Iterable) -> bool:
    return any(isinstance(value, Tensor) for value in _flat(values))
