"""Finetune an encoder with transformers' Trainer: `python examples/trainer.py MODEL OUTPUT`.

The task needs no files: of sentences from Python's documentation half have two words swapped. Which?
"""

import sys

from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import fastspec
from fastspec.studies.glue.sentences import sentences, swap_rows


def main(model_path, output, rows=2000, **options):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2)
    fastspec.spectralize(model, fastspec.SpectralConfig(rank="full", core="band"))

    def encode(text, label):
        return {**tokenizer(text, truncation=True, max_length=64), "labels": label}

    data = [encode(*row) for row in swap_rows(sentences())[: rows + 200]]
    arguments = TrainingArguments(
        output, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, **options
    )
    # without `optimizers` it makes its own, with rates for the core and the head
    trainer = fastspec.SpectralTrainer(
        model,
        arguments,
        train_dataset=data[200:],
        eval_dataset=data[:200],
        processing_class=tokenizer,
    )
    trainer.train()  # or trainer.train(resume_from_checkpoint=True): checkpoints are adapter folders
    trainer.save_model(output)  # fastspec.load_adapter(base, output) is the trained model


if __name__ == "__main__":
    main(*sys.argv[1:3])
