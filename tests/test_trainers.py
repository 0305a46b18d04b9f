"""Trainers that know nothing of adapters: what they save is not lost. Lightning checkpoints."""

import copy
import io
import warnings

import pytest
import torch
from test_checkpoints import rows, trained
from test_rates import arguments
from tiny_models import bert

import fastspec
from fastspec import SpectralConfig, load_adapter, spectralize

transformers = pytest.importorskip("transformers")
IDS = torch.arange(16).reshape(2, 8)
RATE = {"learning_rate": 1e-2}


def adapted():
    return spectralize(bert(num_labels=3), SpectralConfig(rank=4))


def logits(model):
    return model.eval()(IDS).logits


class TestSavePretrained:
    def saved(self, folder):
        model = adapted()
        with torch.no_grad():
            for p in trained(model):
                model.get_parameter(p).normal_()
        with pytest.warns(UserWarning, match="base weights alone"):
            model.save_pretrained(folder)
        return model

    def test_the_folder_holds_base_and_adapter(self, tmp_path):
        model = self.saved(tmp_path)
        base = type(model).from_pretrained(tmp_path)
        assert torch.equal(logits(load_adapter(base, tmp_path)), logits(model))

    def test_a_merged_model_is_saved_as_it_is(self, tmp_path):
        model = fastspec.merge(adapted())
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.save_pretrained(tmp_path)
        assert not (tmp_path / "adapter.safetensors").exists()

    def test_what_can_not_be_an_adapter_is_said(self, tmp_path):
        model = adapted()
        torch.nn.init.constant_(model.classifier.bias, torch.nan)
        with pytest.warns(UserWarning, match="holds no adapter: .*NaN"):
            model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()

    def test_copies_save_themselves(self, tmp_path):
        model = adapted()
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for i, twin in enumerate((copy.deepcopy(model), torch.load(stream, weights_only=False))):
            with torch.no_grad():
                twin.classifier.bias.fill_(i + 1.0)
            with pytest.warns(UserWarning, match="base weights alone"):
                twin.save_pretrained(tmp_path / str(i))
            loaded = load_adapter(bert(num_labels=3), tmp_path / str(i))
            assert torch.equal(logits(loaded), logits(twin))
            assert not torch.equal(logits(loaded), logits(model))


class TestPlainTrainer:
    def test_its_checkpoints_hold_the_adapter(self, tmp_path):
        run = transformers.Trainer(
            adapted(), arguments(tmp_path, save_strategy="steps", **RATE), train_dataset=rows(8)
        )
        with pytest.warns(UserWarning, match="base weights alone"):
            run.train()
        loaded = load_adapter(bert(num_labels=3), tmp_path / "checkpoint-2")
        assert torch.equal(logits(loaded), logits(run.model))

    def test_with_the_callback_nothing_is_lost(self, tmp_path):
        run = transformers.Trainer(
            adapted(),
            arguments(tmp_path, **RATE),
            train_dataset=rows(8),
            callbacks=[fastspec.AdapterCallback()],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            run.train()  # nobody asked it to save
        assert {p.name for p in tmp_path.iterdir()} == {"adapter.safetensors"}
        loaded = load_adapter(bert(num_labels=3), tmp_path)
        assert torch.equal(logits(loaded), logits(run.model))

    def test_a_model_that_transformers_does_not_know(self, tmp_path):
        class Wrapped(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = bert(num_labels=3)

            def forward(self, input_ids, labels):
                return self.inner(input_ids=input_ids, labels=labels)

        run = transformers.Trainer(
            spectralize(Wrapped(), SpectralConfig(rank=4, modules_to_save=["inner.classifier"])),
            arguments(tmp_path, save_strategy="steps", **RATE),
            train_dataset=rows(8),
            callbacks=[fastspec.AdapterCallback()],
        )
        run.train()
        for folder in (tmp_path, tmp_path / "checkpoint-2"):
            loaded = load_adapter(Wrapped(), folder)
            assert torch.equal(logits(loaded.inner), logits(run.model.inner))

    def test_the_callback_refuses_a_model_without_coefficients(self, tmp_path):
        run = transformers.Trainer(
            bert(num_labels=3),
            arguments(tmp_path),
            train_dataset=rows(8),
            callbacks=[fastspec.AdapterCallback()],
        )
        with pytest.raises(
            ValueError, match=r"no coefficients to train: call fastspec\.spectralize"
        ):
            run.train()

    def test_a_peft_model_is_saved_as_peft_does(self, tmp_path):
        peft = pytest.importorskip("peft")
        import fastspec.peft

        config = fastspec.peft.SpectralConfig(r=4, task_type="SEQ_CLS")
        run = transformers.Trainer(
            peft.get_peft_model(bert(num_labels=3), config),
            arguments(tmp_path, **RATE),
            train_dataset=rows(8),
            callbacks=[fastspec.AdapterCallback()],
        )
        run.train()
        loaded = peft.PeftModel.from_pretrained(bert(num_labels=3), tmp_path)
        assert torch.equal(logits(loaded), logits(run.model))


class TestLightning:
    @pytest.fixture(scope="class")
    def module(self):
        lightning = pytest.importorskip("lightning")

        class Module(fastspec.LightningAdapter, lightning.LightningModule):
            def __init__(self, seed=0, rank=4):
                super().__init__()
                self.model = bert(seed, num_labels=3)
                if rank:
                    spectralize(self.model, SpectralConfig(rank=rank))
                self.beside = torch.nn.Linear(2, 2)

            def training_step(self, ids, _):
                return self.model(input_ids=ids, labels=ids[:, 0] % 3).loss

            def configure_optimizers(self):
                return torch.optim.AdamW(fastspec.parameter_groups(self.model))

        return Module

    def fit(self, module, folder, epochs, resume=None):
        import lightning

        lightning.seed_everything(1, verbose=False)
        run = lightning.Trainer(
            max_epochs=epochs,
            default_root_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = torch.utils.data.DataLoader([r["input_ids"] for r in rows(32)], batch_size=4)
        module.model.eval()  # no dropout: what a resumed epoch draws is not what the first drew
        run.fit(module, data, ckpt_path=resume)
        (checkpoint,) = folder.glob("checkpoints/*.ckpt")
        return checkpoint

    def test_a_checkpoint_is_the_adapter_and_resumes_bit_for_bit(self, module, tmp_path):
        whole, half, resumed = module(), module(), module()
        resumed.beside.load_state_dict(half.beside.state_dict())
        self.fit(whole, tmp_path / "whole", 2)
        checkpoint = self.fit(half, tmp_path / "half", 1)
        held = torch.load(checkpoint, weights_only=False)
        assert held["state_dict"].keys() == {"beside.weight", "beside.bias"}
        (content,) = held["fastspec_adapters"].values()
        numbers = sum(p.numel() for p in trained(half.model).values())
        assert content.numel() < 4 * numbers + 8192

        with torch.no_grad():
            resumed.beside.weight.zero_()
        self.fit(resumed, tmp_path / "resumed", 2, resume=checkpoint)
        a, b = trained(resumed.model), trained(whole.model)
        assert all(torch.equal(a[n], b[n]) for n in b)
        assert torch.equal(resumed.beside.weight, half.beside.weight)

    def test_load_from_checkpoint(self, module, tmp_path):
        first = module()
        checkpoint = self.fit(first, tmp_path, 1)
        loaded = module.load_from_checkpoint(checkpoint)
        assert torch.equal(logits(loaded.model), logits(first.model))

    def test_compiled_or_not_they_read_each_other(self, module, tmp_path):
        class Compiled(module):
            def __init__(self):
                super().__init__()
                self.model = torch.compile(self.model, backend="eager")

        for first, second in ((Compiled, module), (module, Compiled)):
            trained_one = first()
            checkpoint = self.fit(trained_one, tmp_path / first.__name__, 1)
            loaded = second.load_from_checkpoint(checkpoint)
            assert torch.equal(logits(loaded.model), logits(trained_one.model))

    def test_other_base_weights_and_ranks_are_refused(self, module, tmp_path):
        checkpoint = self.fit(module(), tmp_path, 1)
        with pytest.raises(fastspec.model.adapter.AdapterError, match="other base weights"):
            module.load_from_checkpoint(checkpoint, seed=1)
        with pytest.raises(fastspec.model.adapter.AdapterError, match="rank"):
            module.load_from_checkpoint(checkpoint, rank=2)

    def test_a_module_without_adapter_is_refused(self, module, tmp_path):
        with pytest.raises(ValueError, match="nothing in the module is adapted"):
            module(rank=None).on_save_checkpoint({"state_dict": {}})
        with pytest.raises(ValueError, match="without LightningAdapter"):
            module().on_load_checkpoint({"state_dict": {}})
