"""A whole training program for DDP or FSDP2, started by torchrun; tests/test_distributed.py runs it.

Prints the loss of every step. Checkpoints after each step; started again it goes on from the last one.
"""

import argparse
import faulthandler
import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_models import net
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastspec
from fastspec.model.fsdp import shard_factors

STEPS, ROWS = 6, 8


def adapted() -> nn.Module:
    return fastspec.spectralize(net().train(), fastspec.SpectralConfig(rank=4, core="dense"))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    groups = fastspec.parameter_groups(model, 3e-2, head_lr=1e-3)
    return torch.optim.AdamW(groups, fused=True)


def batch(step: int, rank: int, world: int) -> torch.Tensor:
    """This process's share of the rows of one step."""
    g = torch.Generator().manual_seed(step)
    return torch.randint(0, 11, (ROWS, 5), generator=g)[rank::world]


def with_gloo(program: Callable[[], None]) -> None:
    """Runs `program` between the beginning and the end of a process group. A process that hangs says where.

    What it made goes first: a DDP wrapper that outlives the group joins gloo's threads while it holds the
    interpreter's lock, which they may be waiting for (https://github.com/pytorch/pytorch/issues/56297).
    """
    faulthandler.dump_traceback_later(240, exit=True)
    dist.init_process_group("gloo")
    program()
    gc.collect()  # Trainer refers to itself
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["ddp", "fsdp", "fsdp-sharded-factors"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", action="store_true", help="the last process dies in step 3")
    args = parser.parse_args()
    with_gloo(lambda: train(args))


def train(args: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()

    model = adapted()
    if args.mode == "fsdp-sharded-factors":
        shard_factors(model)
    if args.mode != "ddp":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = optimizer_of(model)

    begin = 0
    latest = args.folder / "latest"
    if latest.exists():
        checkpoint = args.folder / latest.read_text()
        fastspec.load_adapter(model, checkpoint)
        state = get_optimizer_state_dict(model, optimizer)
        dcp.load({"optimizer": state}, checkpoint_id=checkpoint / "optimizer")
        set_optimizer_state_dict(model, optimizer, state)
        begin = int(latest.read_text())
    compute = (
        DistributedDataParallel(model, broadcast_buffers=False) if args.mode == "ddp" else model
    )

    for step in range(begin, STEPS):
        if args.kill and step == 3 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = compute(batch(step, rank, world)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        checkpoint = args.folder / str(step + 1)
        if args.mode != "ddp" or rank == 0:
            fastspec.save_adapter(model, checkpoint, bases=args.mode == "fsdp-sharded-factors")
        state = get_optimizer_state_dict(model, optimizer)
        dcp.save({"optimizer": state}, checkpoint_id=checkpoint / "optimizer")
        if rank == 0:
            print(f"step {step} loss {mean.item():.9e}", flush=True)
            latest.with_suffix(".tmp").write_text(str(step + 1))
            latest.with_suffix(".tmp").replace(latest)
        dist.barrier()
    parameters = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    held = sum(t.numel() for t in (*parameters, *model.buffers()))
    print(f"rank {rank} holds {held}", flush=True)


if __name__ == "__main__":
    main()
