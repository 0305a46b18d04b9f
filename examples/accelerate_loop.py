"""A loop of one's own under Accelerate: `python examples/accelerate_loop.py MODEL OUTPUT`."""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastspec
from fastspec.studies.decoder.text import blocks, texts


def main(model_path, output, steps=100, resume=False):
    accelerator = Accelerator()
    fastspec.checkpoint_adapters(accelerator)  # its states hold the adapter, not the model
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    fastspec.spectralize(model, fastspec.SpectralConfig(rank="full"))
    optimizer = torch.optim.AdamW(fastspec.parameter_groups(model))
    rows = DataLoader(blocks(texts()[0], tokenizer, 4 * steps, length=128, seed=0), batch_size=4)
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    if resume:
        accelerator.load_state(f"{output}/state")
    model.train()
    for ids in rows:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(f"{output}/state")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        fastspec.save_adapter(accelerator.unwrap_model(model), output)
    return loss.item()


if __name__ == "__main__":
    main(*sys.argv[1:3])
