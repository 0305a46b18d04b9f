"""Weights that change under FSDP2 and DDP; tests/test_distributed.py starts it by torchrun.

Prints one line a case: the largest relative difference between the gradients of the coefficients and those
of a plain process, and how often the layers compared their weights in the steps before the change.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_train import with_gloo
from tiny_models import net
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastspec
import fastspec.nn.made_from as made_from
from fastspec.model.fsdp import shard_factors, whole
from fastspec.model.targets import spectral_layers

IDS = torch.arange(20).view(4, 5) % 11


def adapted(seed: int = 0) -> nn.Module:
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(noise * bool(seed))
    return fastspec.spectralize(model, fastspec.SpectralConfig(rank=4, core="dense"))


def sharded(model: nn.Module, factors: bool) -> nn.Module:
    if factors:
        shard_factors(model)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS).square().sum().backward()
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: whole(layer.delta.grad) for name, layer in spectral_layers(plain)}


def error(model: nn.Module, wanted: dict[str, Tensor]) -> float:
    got = gradients(model)
    return max(
        float((got[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted
    )


def cases(folder: Path) -> None:
    other = adapted(seed=1)
    wanted, state = gradients(other), other.state_dict()
    if dist.get_rank() == 0:
        dcp.save(copy.deepcopy(state), checkpoint_id=folder, no_dist=True)
    dist.barrier()

    compared = 0
    fingerprint = made_from.tensor_fingerprint

    def counted(weight: Tensor) -> str:
        nonlocal compared
        compared += 1
        return fingerprint(weight)

    made_from.tensor_fingerprint = counted

    def after_two_steps(model: nn.Module) -> int:
        nonlocal compared
        gradients(model)
        compared = 0
        gradients(model)
        return compared

    def read(model: nn.Module) -> None:
        dcp.load(model.state_dict(), checkpoint_id=folder)

    def load(model: nn.Module) -> None:
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, copy.deepcopy(state), options=options)

    for name, change in (("dcp.load", read), ("set_model_state_dict", load)):
        model = sharded(adapted(), factors=False)
        steps = after_two_steps(model)
        change(model)
        say(name, error(model, wanted), steps)

    model = sharded(adapted(), factors=True)
    steps = after_two_steps(model)
    read(model)
    try:
        gradients(model)
    except ValueError as e:
        say("sharded factors", 0.0, steps, "refused" if "sharded along" in str(e) else str(e))

    # DDP sends the first process's weights to all: the second's factors are of others
    model = adapted(seed=1 + dist.get_rank())
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    steps = after_two_steps(ddp)
    say("DDP", error(ddp, wanted), steps)


def say(name: str, difference: float, compared: int, *more: str) -> None:
    worst = torch.tensor([difference, compared])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(f"{name}: {worst[0]:.1e} {int(worst[1])}", *more, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with_gloo(lambda: cases(folder))
