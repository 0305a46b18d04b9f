"""`graphed`: a whole training step as one CUDA graph, for models whose launches cost more than their work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastspec.model.buffers import persistent_buffers

WARMUP = 3  # the steps before a capture: kept copies are laid out in two of them, kernels compiled in three
DEVICES = ("cuda",)  # that capture

T = TypeVar("T")
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def graphed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    example: Mapping[str, Tensor],
    loss: Loss = lambda model, batch: model(**batch).loss,
) -> Callable[..., Tensor]:
    """A training step (forward, backward, optimiser, gradients to None) that is captured once and replayed.

    Args:
        model: on a GPU, in train mode. On a CPU the same step runs uncaptured.
        optimizer: of the model's trained parameters, `capturable=True` (Adam's family, in PyTorch). Its rates
            become tensors, so that a schedule still sets them.
        example: a batch as all will be: tensors by name, of these shapes and dtypes, on the model's device.
        loss: of the model and a batch.

    Returns:
        step(**batch) -> the loss, a tensor that the next step writes over. Capturing leaves parameters,
        buffers and the optimiser's state as they were.

    What a graph can't hold: other shapes (pad to one length), values that the host looks at, gradient
    scaling, hooks that run Python, and a model that is changed in kind afterwards (merged, cast, another
    task): make another one. Checkpoint and evaluate between steps as ever.

    Raises:
        ValueError: the optimiser is not capturable, the model is on several devices, or, by the step, a batch
            of other names, shapes or dtypes.
        TypeError: what should be a tensor is none.
    """
    device = _device_of(model)
    if not isinstance(example, Mapping) or not all(isinstance(t, Tensor) for t in example.values()):
        raise TypeError(
            f"example must map names to tensors, got {type(example).__name__}; leave out what is None, and "
            "give inputs their names"
        )
    static = {name: t.detach().to(device, copy=True) for name, t in example.items()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> Tensor:
        value = loss(model, static)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the model's loss must be a tensor, got {value!r}: give labels in the batch, or a `loss`"
            )
        value.backward()
        optimizer.step()
        # inside a graph the gradients then are the graph's own, written anew by each replay
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    if device.type in DEVICES:
        _make_capturable(optimizer, device)
        with _left_as_it_was(model, optimizer):
            replay = capture(step)
    else:
        replay = step

    def run(**batch: Tensor) -> Tensor:
        if batch.keys() != static.keys():
            raise ValueError(f"a batch of {sorted(static)} was captured, got {sorted(batch)}")
        for name, t in batch.items():
            own = static[name]
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a tensor, got {t!r}")
            if t.shape != own.shape or t.dtype != own.dtype:
                raise ValueError(
                    f"{name} must be {list(own.shape)} in {own.dtype} as captured, got {list(t.shape)} in "
                    f"{t.dtype}: pad it, or make another graph"
                )
            own.copy_(t, non_blocking=True)
        value = replay()
        if replay is not step:  # which PyTorch does not count as writes
            torch.autograd.graph.increment_version(trained)
        return value

    return run


def capture(step: Callable[[], T]) -> Callable[[], T]:
    """A CUDA graph of the step, after some that run as ever; replaying it returns what the step returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> T:
        graph.replay()
        return kept

    return replay


def _device_of(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise ValueError(
            f"the model must be on one device, and is on {sorted(map(str, devices)) or 'none'}"
        )
    return devices.pop()


def _make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let the optimiser take its rates from the device.

    Raises:
        ValueError: it counts its steps on the host.
    """
    for group in optimizer.param_groups:
        if "capturable" in group and not group["capturable"]:
            raise ValueError(
                f"{type(optimizer).__name__} counts its steps on the host, which a graph would not see: make "
                "it with capturable=True"
            )
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.tensor(float(group["lr"]), device=device)


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Around a warm-up: afterwards parameters, buffers and the optimiser's state have their former values.

    All in place, since a graph knows them by address. State that is new, as before a first step, becomes
    zero.
    """

    def state() -> list[Tensor]:
        return [
            value
            for values in optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]

    trained = [p for group in optimizer.param_groups for p in group["params"]]
    moving = [*trained, *(buffer for _, buffer in persistent_buffers(model)), *state()]
    before = {id(t): (t, t.detach().clone()) for t in moving}
    try:
        yield
    finally:
        with torch.no_grad():
            for t in state():
                if id(t) not in before:
                    t.zero_()
            for t, value in before.values():
                t.copy_(value)
