"""Supervised finetuning with TRL: `python examples/sft.py MODEL OUTPUT`, text from Python's documentation."""

import sys

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import fastspec.peft
from fastspec.studies.decoder.text import texts


def main(model_path, output, rows=2000, **options):
    training, held_out = (Dataset.from_dict({"text": part[:rows]}) for part in texts())
    options = {"bf16": torch.cuda.is_available()} | options  # TRL's default wants a GPU
    arguments = SFTConfig(output, model_init_kwargs={"dtype": torch.float32}, **options)
    trainer = SFTTrainer(
        model_path,
        arguments,
        train_dataset=training,
        eval_dataset=held_out,
        peft_config=fastspec.peft.SpectralConfig(r="full", task_type="CAUSAL_LM"),
        callbacks=[fastspec.AdapterCallback()],  # the adapter is saved, a rate too low is said
    )
    # TRL's own rate is for other methods' numbers
    trainer.optimizer = torch.optim.AdamW(fastspec.parameter_groups(trainer.model))
    trainer.train()
    print(trainer.evaluate())

    model = AutoPeftModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    plain = model.merge_and_unload()  # a model of transformers, without a trace of the adapter
    plain.save_pretrained(f"{output}/merged")
    AutoTokenizer.from_pretrained(model_path).save_pretrained(f"{output}/merged")


if __name__ == "__main__":
    main(*sys.argv[1:3])
