"""Mixed batches on tiny models of transformers whose layers do not get the batch as the model got it."""

import pytest
import torch
from support import assert_close
from tasks_support import random_values
from tiny_models import bert, gpt2, llama, roberta, t5

import fastspec
from fastspec import SpectralConfig, spectralize

transformers = pytest.importorskip("transformers")

NAMES = ["b", None, "a", "b"]
IDS = torch.arange(28).reshape(4, 7) * 5 % 41 + 5
ENCODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DEBERTA = ENCODER | {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
    "position_biased_input": False,
}
MODERNBERT = ENCODER | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "global_attn_every_n_layers": 2,
    "local_attention": 4,
    "attn_implementation": "sdpa",
}
OPT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
XLNET = {"vocab_size": 50, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
ENCODER_DECODER = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
BART = {
    **ENCODER_DECODER,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
WHISPER = {
    **ENCODER_DECODER,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}


def build(family, task, fields):
    config = getattr(transformers, f"{family}Config")(**fields)
    torch.manual_seed(0)
    return getattr(transformers, family + task)(config).eval()


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def padded(ids):
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def ending(ids):
    """BART's classifier reads the last end token, of which every row has as many."""
    ids = ids.clone()
    ids[:, -1] = 2
    return {"input_ids": ids}


CLASSIFIER = "ForSequenceClassification"
FAMILIES = {
    "bert": (bert, padded(IDS)),
    "roberta": (roberta, padded(IDS)),
    "gpt2": (gpt2, {"input_ids": IDS}),
    "llama": (llama, {"input_ids": IDS}),
    "deberta": (lambda: build("Deberta", CLASSIFIER, DEBERTA), padded(IDS)),
    "deberta-v2": (lambda: build("DebertaV2", CLASSIFIER, DEBERTA), padded(IDS)),
    "deberta-v3": (
        lambda: build(
            "DebertaV2",
            CLASSIFIER,
            DEBERTA | {"share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
        ),
        padded(IDS),
    ),
    "opt": (lambda: build("OPT", "ForCausalLM", OPT), {"input_ids": IDS}),
    "opt, classes": (lambda: build("OPT", CLASSIFIER, OPT), {"input_ids": IDS}),
    "xlnet": (lambda: build("XLNet", CLASSIFIER, XLNET), {"input_ids": IDS}),
    "swin": (
        lambda: build("Swin", "ForImageClassification", SWIN),
        {"pixel_values": seeded(4, 3, 16, 16)},
    ),
    "modernbert": (lambda: build("ModernBert", CLASSIFIER, MODERNBERT), padded(IDS)),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}),
    "bart": (
        lambda: build("Bart", "ForConditionalGeneration", BART),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]},
    ),
    "bart, classes": (lambda: build("Bart", CLASSIFIER, BART), ending(IDS)),
    "whisper": (
        lambda: build("Whisper", "ForConditionalGeneration", WHISPER),
        {"input_features": seeded(4, 8, 20), "decoder_input_ids": IDS[:, :5]},
    ),
}


def with_tasks(make):
    model = spectralize(make(), SpectralConfig(rank=4))
    bank = fastspec.task_bank(model)
    for seed, name in enumerate("ab"):
        fastspec.add_task(model, name, random_values(bank, seed))
    return model


def rows_of(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def check_rows(model, batch, names):
    with torch.no_grad():
        mixed = model(**batch, tasks=names).logits
        for row, name in enumerate(names):
            fastspec.set_task(model, name)
            own = model(**rows_of(batch, slice(row, row + 1))).logits
            fastspec.set_task(model, None)
            assert_close(mixed[row : row + 1], own)
    return mixed


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_each_row_is_its_task_alone(self, family):
        make, batch = FAMILIES[family]
        model = with_tasks(make)
        mixed = check_rows(model, batch, NAMES)
        assert not torch.allclose(mixed[1], mixed[0], rtol=0.01)
        check_rows(
            model, rows_of(batch, [3, 1, 2]), ["a", "b", None]
        )  # another size, by what is known

    def test_as_many_tokens_as_rows(self, family):
        make, batch = FAMILIES[family]
        square = {n: v[:, :4] if v.dim() == 2 else v for n, v in batch.items()}
        if family == "bart, classes":
            square = ending(square["input_ids"])
        check_rows(with_tasks(make), square, NAMES)

    def test_gradients_are_those_of_the_tasks_alone(self, family):
        make, batch = FAMILIES[family]
        model = with_tasks(make)
        bank = model.task_bank
        g = seeded(*model(**batch).logits.shape)
        separate = {}
        for name in "ab":
            rows = [i for i, n in enumerate(NAMES) if n == name]
            fastspec.set_task(model, name)
            model.zero_grad()
            model(**rows_of(batch, rows)).logits.backward(g[rows])
            separate[name] = {s.name: s.live.grad.clone() for s in bank.slots}
        bank.requires_grad_()
        model(**batch, tasks=NAMES).logits.backward(g)
        for name in "ab":
            place = int(bank.places(bank.index([name])))
            for slot in bank.slots:
                assert_close(slot.table.grad[place], separate[name][slot.name])


GENERATION = {
    "opt": ("opt", {"input_ids": IDS}),
    "t5": ("t5", {"input_ids": IDS}),
    "bart": ("bart", {"input_ids": IDS}),
    "whisper": ("whisper", {"input_features": seeded(4, 8, 20)}),
}


@pytest.mark.parametrize("family", GENERATION)
class TestGenerate:
    @pytest.mark.parametrize(
        "options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str
    )
    def test_a_prompt_has_one_task(self, family, options):
        family, batch = GENERATION[family]
        model = with_tasks(FAMILIES[family][0])
        options = {"max_new_tokens": 5, "do_sample": False, **options}
        together = model.generate(**batch, tasks=NAMES, **options)
        with fastspec.tasks(NAMES):
            assert torch.equal(model.generate(**batch, **options), together)
        each = options.get("num_return_sequences", 1)
        for row, name in enumerate(NAMES):
            fastspec.set_task(model, name)
            own = model.generate(**rows_of(batch, slice(row, row + 1)), **options)
            got = together[row * each : (row + 1) * each]
            width = max(own.shape[1], got.shape[1])
            pad = [torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in (own, got)]
            assert torch.equal(*pad)

    def test_names_for_sequences_in_another_order_are_refused(self, family):
        family, batch = GENERATION[family]
        model = with_tasks(FAMILIES[family][0])
        names = NAMES * 2  # all prompts, then all again: sequences of one prompt stand together
        with pytest.raises(ValueError, match="one task a prompt: got 8 for 4 prompts"):
            model.generate(
                **batch, tasks=names, num_beams=2, num_return_sequences=2, max_new_tokens=3
            )
        with pytest.raises(ValueError, match="one task a prompt: got 3 for 4 prompts"):
            model.generate(**batch, tasks=names[:3], max_new_tokens=3)
