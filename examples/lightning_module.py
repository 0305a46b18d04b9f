"""Lightning: `python examples/lightning_module.py MODEL OUTPUT`, checkpoints of the adapter alone."""

import sys

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastspec
from fastspec.studies.decoder.text import blocks, texts


class Finetuning(fastspec.LightningAdapter, lightning.LightningModule):
    def __init__(self, model_path):
        super().__init__()
        self.save_hyperparameters()
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        fastspec.spectralize(self.model.train(), fastspec.SpectralConfig(rank="full"))

    def training_step(self, ids, _):
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(fastspec.parameter_groups(self.model))


def main(model_path, output, steps=100, resume_from=None, **options):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data = blocks(texts()[0], tokenizer, count=4 * steps, length=128, seed=0)
    module = Finetuning(model_path)
    trainer = lightning.Trainer(max_steps=steps, default_root_dir=output, **options)
    trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True), ckpt_path=resume_from)
    fastspec.save_adapter(module.model, output)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:3])
