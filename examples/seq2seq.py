"""Seq2SeqTrainer: `python examples/seq2seq.py MODEL OUTPUT` learns a docstring's first line from its rest."""

import sys

import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

import fastspec
from fastspec.studies.decoder.text import texts


class AdapterSeq2SeqTrainer(fastspec.AdapterCheckpoints, transformers.Seq2SeqTrainer):
    """Its checkpoints are adapter folders, its optimiser has rates for coefficients."""


def main(model_path, output, rows=2000, **options):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_path)
    fastspec.spectralize(model, fastspec.SpectralConfig(rank="full"))
    parts = [text.partition("\n\n") for text in texts()[0] if "\n\n" in text][:rows]
    data = [
        tokenizer(rest, text_target=first, truncation=True, max_length=128)
        for first, _, rest in parts
    ]
    trainer = AdapterSeq2SeqTrainer(
        model,
        transformers.Seq2SeqTrainingArguments(output, predict_with_generate=True, **options),
        train_dataset=data[len(data) // 10 :],
        eval_dataset=data[: len(data) // 10],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
    )
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:3])
