"""The code blocks of docs/distributed.md, each run as it stands there; tests/test_distributed.py starts it.

Prints the losses of two steps for each.
"""

import re
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_train import adapted, batch, with_gloo
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastspec

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"


def main() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)):
        names = {
            "torch": torch,
            "fastspec": fastspec,
            "DistributedDataParallel": DistributedDataParallel,
            "fully_shard": fully_shard,
            "model": adapted(),
        }
        exec(compile(block, str(PAGE), "exec"), names)
        for step in range(2):
            compute = names.get("compute", names["model"])
            loss = compute(batch(step, rank, world)).square().mean()
            loss.backward()
            names["optimizer"].step()
            names["optimizer"].zero_grad()
            mean = loss.detach() / world
            dist.all_reduce(mean)
            if rank == 0:
                print(f"block {number} step {step} loss {mean.item():.9e}", flush=True)


if __name__ == "__main__":
    with_gloo(main)
