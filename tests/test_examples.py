"""The files of examples/ in miniature: each trains, saves the adapter, and goes on from what it saved."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from glue_support import word_tokenizer
from tiny_models import bert, llama, t5

import fastspec

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fastspec.studies.decoder.text import texts

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    """The commonest words of Python's documentation."""
    words = Counter(word for text in texts()[0][:400] for word in re.findall(r"\w+", text))
    made = word_tokenizer([word for word, _ in words.most_common(200)])
    made.eos_token = "[SEP]"
    made.model_max_length = 10_000
    return made


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A folder with a tiny model of each kind and its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    models = {
        "encoder": bert(
            vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.3
        ),
        "decoder": llama(vocab_size=len(tokenizer), max_position_embeddings=2048),
        "seq2seq": t5(vocab_size=len(tokenizer), eos_token_id=3),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_adapter(base, folder):
    """The folder holds an adapter of `base`, alone, that training moved."""
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = fastspec.load_adapter(base, folder)
    deltas = [p for n, p in model.named_parameters() if n.endswith(".delta")]
    assert deltas
    assert all(bool(d.abs().max() > 0) for d in deltas)
    assert not list(Path(folder).glob("model*.safetensors"))
    kept = dict(model.named_parameters())
    assert all(torch.equal(p, kept[n]) for n, p in before.items() if not n.startswith("classifier"))
    return model


def test_they_are_short_and_all_are_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"trainer", "sft", "seq2seq", "lightning_module", "accelerate_loop"}
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path


def test_trainer(place, tmp_path):
    example("trainer").main(str(place / "encoder"), str(tmp_path), rows=40, **QUICK)
    base = AutoModelForSequenceClassification.from_pretrained(place / "encoder", num_labels=2)
    check_adapter(base, tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(place / "encoder", num_labels=2)
    check_adapter(base, tmp_path / "checkpoint-4")


def test_seq2seq(place, tmp_path):
    example("seq2seq").main(str(place / "seq2seq"), str(tmp_path), rows=40, **QUICK)
    check_adapter(AutoModelForSeq2SeqLM.from_pretrained(place / "seq2seq"), tmp_path)


def test_sft(place, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    example("sft").main(str(place / "decoder"), str(tmp_path), rows=40, bf16=False, **QUICK)
    from peft import AutoPeftModelForCausalLM

    ids = torch.arange(10).reshape(1, 10)
    base = AutoModelForCausalLM.from_pretrained(place / "decoder")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        trained = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(trained(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base(ids).logits, merged(ids).logits, atol=1e-3)


def test_sft_without_the_bridge(place, tmp_path):
    """TRL knows nothing of the adapter: the callback saves it, and its default rate is warned of."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    base = AutoModelForCausalLM.from_pretrained(place / "decoder")
    model = fastspec.spectralize(base, fastspec.SpectralConfig(rank=4))
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path), bf16=False, save_strategy="no", **QUICK),
        train_dataset=Dataset.from_dict({"text": texts()[0][:40]}),
        processing_class=AutoTokenizer.from_pretrained(place / "decoder"),
        callbacks=[fastspec.AdapterCallback()],
    )
    with pytest.warns(UserWarning, match="they would hardly move"):
        trainer.train()
    loaded = check_adapter(AutoModelForCausalLM.from_pretrained(place / "decoder"), tmp_path)
    kept = dict(loaded.named_parameters())
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


def test_lightning(place, tmp_path):
    pytest.importorskip("lightning")
    import lightning

    module = example("lightning_module")
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.seed_everything(0)
    whole = module.main(str(place / "decoder"), str(tmp_path), steps=4, **options)
    check_adapter(AutoModelForCausalLM.from_pretrained(place / "decoder"), tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    numbers = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    assert checkpoint.stat().st_size < 3 * 4 * numbers + 40_000, (
        "coefficients and AdamW's two moments"
    )

    loaded = module.Finetuning.load_from_checkpoint(checkpoint, weights_only=False)
    ids = torch.arange(10).reshape(1, 10)
    assert torch.equal(loaded.model.eval()(ids).logits, whole.model.eval()(ids).logits)


def test_accelerate(place, tmp_path):
    module = example("accelerate_loop")
    first = module.main(str(place / "decoder"), str(tmp_path), steps=12)
    check_adapter(AutoModelForCausalLM.from_pretrained(place / "decoder"), tmp_path)
    assert not list((tmp_path / "state").rglob("model*.safetensors"))
    again = module.main(str(place / "decoder"), str(tmp_path), steps=12, resume=True)
    assert again < first, "it goes on from the adapter it saved"
