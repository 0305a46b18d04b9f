"""SpectralTrainer under torchrun, as docs/distributed.md has it; tests/test_distributed.py runs it.

Prints the loss of every step, and who writes which checkpoint.
"""

import sys

import torch
import torch.distributed as dist
from distributed_train import with_gloo
from tiny_models import NO_DROPOUT, bert
from transformers import TrainingArguments

import fastspec
import fastspec.model.checkpoints
from fastspec import SpectralConfig, parameter_groups, spectralize

STEPS, ROWS = 4, 8  # rows of a step, over all processes


def trainer(folder: str, processes: int) -> fastspec.SpectralTrainer:
    model = spectralize(bert(**NO_DROPOUT["bert"]), SpectralConfig(rank=4))
    groups = parameter_groups(model, lr=3e-2, head_lr=1e-3)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=ROWS // processes,
        max_steps=STEPS,
        save_steps=2,
        logging_steps=1,
        ddp_broadcast_buffers=False,
        average_tokens_across_devices=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    ids = torch.randint(0, 50, (4 * ROWS, 8), generator=torch.Generator().manual_seed(1))
    return fastspec.SpectralTrainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": int(row.sum()) % 2} for row in ids],
        optimizers=(torch.optim.AdamW(groups, fused=True), None),
    )


def losses(run: fastspec.SpectralTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def main() -> None:
    write = fastspec.model.checkpoints.save_adapter

    def announced(model: torch.nn.Module, folder: str, **options: bool) -> object:
        print(f"rank {dist.get_rank()} writes {folder}", flush=True)
        return write(model, folder, **options)

    fastspec.model.checkpoints.save_adapter = announced
    run = trainer(sys.argv[1], dist.get_world_size())
    run.train()
    if dist.get_rank() == 0:
        for step, loss in enumerate(losses(run)):
            print(f"step {step} loss {loss:.9e}", flush=True)


if __name__ == "__main__":
    with_gloo(main)
