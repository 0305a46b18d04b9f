"""The PEFT bridge on disk: adapter folders, transformers' own adapters, and export as LoRA."""

import json

import peft
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import replicate_layers
from peft_support import CASES, CORES, PREFIX, adapted, layers, mlp_config, output, shift
from safetensors.torch import load_file, save_file
from support import assert_close, minilm
from tiny_models import bert, gpt2, mlp

import fastspec.peft
from fastspec.model.adapter import AdapterError
from fastspec.peft import SpectralConfig, convert_to_lora, save_as_lora


class TestFolders:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("core", CORES, ids=lambda o: o["core"])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu"])
    def test_round_trip(self, tmp_path, case, core, low_cpu_mem_usage):
        model = adapted(case, **core)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(
            CASES[case][0](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert not any(p.requires_grad for p in loaded.parameters())
        for mine, theirs in zip(layers(loaded), layers(model), strict=True):
            assert mine.fastspec_delta["default"].dtype == torch.float32
            assert torch.equal(mine.fastspec_delta["default"], theirs.fastspec_delta["default"])
            for name, factor in mine.fastspec_basis["default"].named_buffers():
                assert torch.equal(factor, getattr(theirs.fastspec_basis["default"], name))
        with torch.no_grad():
            assert torch.equal(output(loaded), output(model.requires_grad_(False)))

    def test_what_is_written(self, tmp_path):
        model = adapted("bert", r=4, core="dense")
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        names = [n for n, m in model.named_modules() if m in layers(model)]
        heads = {f"{PREFIX}classifier.{part}" for part in ("weight", "bias")}
        parts = ("delta", "sketch")
        assert tensors.keys() == {f"{n}.fastspec_{part}" for n in names for part in parts} | heads
        assert {t.shape for n, t in tensors.items() if "delta" in n} == {torch.Size([4, 4])}
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["peft_type"] == "FASTSPEC"
        assert config["base_fingerprint"].keys() == {n.removeprefix(PREFIX) for n in names}
        assert {len(digest) for digest in config["base_fingerprint"].values()} == {16}
        assert not list(tmp_path.glob("*.bin"))

    def test_the_basis_of_a_real_encoder_is_not_in_it(self, tmp_path):
        model = get_peft_model(minilm(), SpectralConfig(r=32, task_type="SEQ_CLS"))
        model.save_pretrained(tmp_path)
        # 37 layers x 32 coefficients and a head of 2 x 385, 4 bytes each, 37 sketches of 8, and names
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 19_000

    def test_training_goes_on_from_it(self, tmp_path):
        model = adapted("bert")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
        trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad}

    def test_several_adapters_each_in_its_folder(self, tmp_path):
        model = adapted("bert")
        model.add_adapter("other", SpectralConfig(r=2, core="dense", task_type="SEQ_CLS"))
        model.set_adapter("other")
        shift(model, 5)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(bert(), tmp_path)
        loaded.load_adapter(tmp_path / "other", "renamed")
        assert all(
            layer.fastspec_basis["renamed"] is layer.fastspec_basis["default"]
            for layer in layers(loaded)
        )
        loaded.set_adapter("renamed")
        assert torch.equal(output(loaded), output(model))
        loaded.set_adapter("default")
        model.set_adapter("default")
        assert torch.equal(output(loaded), output(model))

    def test_auto_class_and_config_find_the_method(self, tmp_path):
        bert().save_pretrained(tmp_path / "base")
        base = type(bert()).from_pretrained(tmp_path / "base").eval()
        model = get_peft_model(base, SpectralConfig(r=4, task_type="SEQ_CLS")).eval()
        shift(model)
        model.save_pretrained(tmp_path / "a")
        assert isinstance(peft.PeftConfig.from_pretrained(tmp_path / "a"), SpectralConfig)
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "a")
        assert torch.equal(output(loaded), output(model))

    @pytest.mark.parametrize(
        "other", [lambda: mlp(1), lambda: mlp().double()], ids=["values", "dtype"]
    )
    def test_other_base_weights_are_refused(self, tmp_path, other):
        adapted("mlp").save_pretrained(tmp_path)
        base = other()
        before = list(base.modules())
        with pytest.raises(AdapterError, match="'default' was made from other base weights"):
            PeftModel.from_pretrained(base, tmp_path)
        assert list(base.modules()) == before

    def test_other_base_weights_are_refused_for_a_second_adapter(self, tmp_path):
        get_peft_model(mlp(1), mlp_config()).save_pretrained(tmp_path)
        model = adapted("mlp")
        y = output(model)
        with pytest.raises(AdapterError, match="'other' was made from other base weights"):
            model.load_adapter(tmp_path, "other")
        assert list(model.peft_config) == ["default"]
        assert torch.equal(output(model), y)

    @pytest.mark.parametrize("load", [PeftModel.from_pretrained, fastspec.peft.load_adapter])
    def test_the_weight_that_differs_is_named(self, tmp_path, load):
        adapted("mlp").save_pretrained(tmp_path)
        base = mlp()
        base.lin1.weight.data[0, 0] += 1e-3
        with pytest.raises(AdapterError, match=r"not the same are 'lin1' of 2"):
            load(base, tmp_path)

    def test_a_config_may_be_taken_to_other_weights_on_purpose(self, tmp_path):
        adapted("mlp").save_pretrained(tmp_path)
        config = SpectralConfig.from_pretrained(tmp_path)
        with pytest.raises(AdapterError, match="set its base_fingerprint to None"):
            get_peft_model(mlp(1), config)
        config.base_fingerprint = None
        assert torch.equal(output(get_peft_model(mlp(1), config)), output(mlp(1)))

    def test_an_adapter_of_another_rank_is_refused(self, tmp_path):
        adapted("mlp").save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        file.write_text(file.read_text().replace('"r": 4', '"r": 5'))
        with pytest.raises(RuntimeError, match="size mismatch"):
            PeftModel.from_pretrained(mlp(), tmp_path)

    def test_a_missing_tensor_is_reported(self, tmp_path):
        adapted("mlp").save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        del tensors[f"{PREFIX}lin0.fastspec_delta"]
        save_file(tensors, file, {"format": "pt"})
        with pytest.warns(UserWarning, match=r"missing adapter keys.*lin0\.fastspec_delta"):
            PeftModel.from_pretrained(mlp(), tmp_path)

    def test_trained_biases_come_along(self, tmp_path):
        model = adapted("mlp", bias="fastspec_only")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(mlp(), tmp_path)
        assert torch.equal(output(loaded), output(model))


def native_config():
    return SpectralConfig(r=4, modules_to_save=["classifier"])


class TestTransformersAdapters:
    def trained(self):
        model = bert()
        model.add_adapter(native_config(), "task")
        shift(model)
        return model.eval()

    def test_add_disable_enable_delete(self):
        # without modules_to_save, which transformers' enable_adapters() does not switch on again
        config = SpectralConfig(r=4, exclude_modules=["classifier"])
        base, model = output(bert()), bert()
        model.add_adapter(config, "task")
        assert torch.equal(output(model), base)
        shift(model)
        y = output(model)
        assert not torch.allclose(y, base, atol=1e-3)
        model.disable_adapters()
        assert torch.equal(output(model), base)
        model.enable_adapters()
        assert torch.equal(output(model), y)
        model.add_adapter(config, "other")
        assert model.active_adapters() == ["other"]
        assert torch.equal(output(model), base)
        model.set_adapter("task")
        assert torch.equal(output(model), y)
        model.delete_adapter("other")
        assert torch.equal(output(model), y)
        assert all(list(m.fastspec_basis) == ["task"] for m in layers(model))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_save_and_load(self, tmp_path, dtype):
        model = bert().to(dtype)
        model.add_adapter(native_config(), "task")
        shift(model)
        model.save_pretrained(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        loaded = bert().to(dtype)
        loaded.load_adapter(tmp_path, "task")
        assert torch.equal(output(loaded.eval()), output(model.eval()))
        for mine, theirs in zip(layers(loaded), layers(model), strict=True):
            assert mine.fastspec_delta["task"].dtype == torch.float32
            assert torch.equal(mine.fastspec_delta["task"], theirs.fastspec_delta["task"])

    def test_a_folder_of_either_kind_serves_the_other(self, tmp_path):
        model = self.trained()
        model.save_pretrained(tmp_path / "native")
        through_peft = PeftModel.from_pretrained(bert(), tmp_path / "native")
        assert torch.equal(output(through_peft), output(model))
        through_peft.save_pretrained(tmp_path / "peft")
        native = bert()
        native.load_adapter(tmp_path / "peft")
        assert torch.equal(output(native), output(model))

    def test_other_base_weights_are_refused(self, tmp_path):
        self.trained().save_pretrained(tmp_path)
        other = bert(1)
        y = output(other)
        with pytest.raises(AdapterError, match="other base weights"):
            other.load_adapter(tmp_path)
        assert torch.equal(output(other), y)


class TestAsLora:
    @pytest.mark.parametrize("core", CORES, ids=lambda o: o["core"])
    def test_the_same_logits_on_real_weights(self, tmp_path, core):
        options = {"rank_pattern": {"query": 8, "pooler.dense": 4}, "task_type": "SEQ_CLS"}
        model = get_peft_model(minilm(), SpectralConfig(r=32, **options, **core)).eval()
        shift(model, scale=0.1)
        ids = torch.randint(1000, 20000, (4, 16), generator=torch.Generator().manual_seed(0))
        y = model(input_ids=ids).logits
        with model.disable_adapter():
            assert (y - model(input_ids=ids).logits).abs().max() > 0.1
        save_as_lora(tmp_path, model)
        lora = PeftModel.from_pretrained(minilm(), tmp_path)
        assert type(lora.peft_config["default"]) is LoraConfig
        ranks = {
            n.split(".")[-4]: t.shape[0] for n, t in lora.state_dict().items() if "lora_A" in n
        }
        own = core.get("core_rank")
        assert (ranks["query"], ranks["key"]) == ((own, own) if own else (8, 32))
        assert (lora(input_ids=ids).logits - y).abs().max() <= 1e-5
        merged = lora.merge_and_unload()
        assert (merged(input_ids=ids).logits - y).abs().max() <= 1e-5

    @pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning")
    def test_conv1d(self, tmp_path):
        model = adapted("gpt2", core="dense")
        save_as_lora(tmp_path, model)
        lora = PeftModel.from_pretrained(gpt2(), tmp_path)
        assert_close(output(lora), output(model))

    def test_from_a_transformers_adapter_and_one_of_several(self, tmp_path):
        model = bert()
        for seed, name in enumerate(("one", "two")):
            model.add_adapter(SpectralConfig(r=4, exclude_modules=["classifier"]), name)
            shift(model, seed)
        save_as_lora(tmp_path, model, "one")
        lora = PeftModel.from_pretrained(bert(), tmp_path)
        model.set_adapter("one")
        assert_close(output(lora), output(model))

    def test_layers_that_share_a_basis(self, tmp_path):
        def replicated():
            model = bert()
            replicate_layers(model, [[0, 2], [0, 2]])
            return model

        model = get_peft_model(replicated(), SpectralConfig(r=4, task_type="SEQ_CLS")).eval()
        shift(model)
        save_as_lora(tmp_path, model)
        assert_close(output(PeftModel.from_pretrained(replicated(), tmp_path)), output(model))

    def test_half_precision_weights_keep_float32_factors(self):
        model = get_peft_model(bert().bfloat16(), SpectralConfig(r=4, task_type="SEQ_CLS"))
        _, tensors = convert_to_lora(model)
        assert {t.dtype for n, t in tensors.items() if "lora" in n} == {torch.float32}

    def test_pefts_own_conversion_agrees(self):
        model = adapted("bert", core="dense")
        config, approximate = peft.convert_to_lora(model, rank=4)
        _, exact = convert_to_lora(model)
        assert config.r == 4
        for name in exact:
            if name.endswith("lora_A.weight"):
                b = name.replace("lora_A", "lora_B")
                assert_close(approximate[b] @ approximate[name], exact[b] @ exact[name])

    def test_refuses_what_has_no_lora_form(self):
        with pytest.raises(ValueError, match="no spectral adapter named 'x'"):
            convert_to_lora(adapted("mlp"), "x")
        with pytest.raises(ValueError, match="trains biases"):
            convert_to_lora(adapted("mlp", bias="all"))
