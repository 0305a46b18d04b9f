"""The PEFT bridge: what kind of folder it is, and that a damaged one is refused in words."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft_support import CASES, adapted, mlp_config, output, shift
from tiny_models import bert, mlp, t5

import fastspec
from fastspec.model.adapter import AdapterError
from fastspec.peft import SpectralConfig, load_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("keep", [0, 7, 100, -1], ids=str)
@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_peft_s_loader_refuses_a_truncated_file_with_the_model_as_it_was(tmp_path, keep, second):
    adapted("mlp", seed=3).save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:keep])
    model = adapted("mlp") if second else mlp()
    before, y = list(model.modules()), output(model)
    trained = [p.requires_grad for p in model.parameters()]
    load = (
        functools.partial(model.load_adapter, tmp_path, "other")
        if second
        else functools.partial(PeftModel.from_pretrained, model, tmp_path)
    )
    with pytest.raises(AdapterError, match="truncated, damaged or no safetensors file"):
        load()
    assert list(model.modules()) == before
    assert [p.requires_grad for p in model.parameters()] == trained
    assert torch.equal(output(model), y)


def test_in_a_subfolder_too_and_a_config_alone_is_read(tmp_path):
    adapted("mlp").save_pretrained(tmp_path / "sub")
    (tmp_path / "sub" / WEIGHTS).write_bytes(b"no such file")
    with pytest.raises(AdapterError, match=r"sub/adapter_model\.safetensors: truncated"):
        PeftModel.from_pretrained(mlp(), tmp_path, subfolder="sub")
    (tmp_path / "sub" / WEIGHTS).unlink()
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "sub"), SpectralConfig)
    assert SpectralConfig.from_pretrained(tmp_path / "sub").r == 4


class TestKinds:
    def test_fastspec_s_own(self, tmp_path):
        model = fastspec.spectralize(bert(), fastspec.SpectralConfig(rank=4))
        fastspec.save_adapter(model, tmp_path)
        with pytest.raises(AdapterError, match=r"fastspec's own .* load it with fastspec\.load"):
            load_adapter(bert(), tmp_path)
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
            PeftModel.from_pretrained(bert(), tmp_path)

    def test_peft_s_given_to_fastspec(self, tmp_path):
        adapted("bert").save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match="a folder of PEFT"):
            fastspec.load_adapter(bert(), tmp_path)

    def test_another_method_s(self, tmp_path):
        get_peft_model(mlp(), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
        with pytest.raises(AdapterError, match=r"method 'LORA'.*peft\.PeftModel\.from_pretrained"):
            load_adapter(mlp(), tmp_path)

    def test_neither_s(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"format": 2}')
        with pytest.raises(AdapterError, match="'peft_type' is missing"):
            load_adapter(mlp(), tmp_path)


def test_of_an_encoder_and_decoder(tmp_path):
    model = get_peft_model(t5(), SpectralConfig(r=4, task_type="SEQ_2_SEQ_LM")).eval()
    shift(model)
    model.save_pretrained(tmp_path)
    ids = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    loaded = load_adapter(t5(), tmp_path)
    assert torch.equal(loaded(**ids).logits, model(**ids).logits)
    with pytest.raises(AdapterError, match="does not do the task SEQ_2_SEQ_LM"):
        load_adapter(mlp(), tmp_path)


def test_a_head_that_the_model_has_not_is_seen_behind_those_that_peft_names(tmp_path):
    adapted("bert").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert fields["modules_to_save"] == ["classifier", "score"]
    path.write_text(json.dumps(fields | {"modules_to_save": ["score", "classifier", "ranker"]}))
    with pytest.raises(AdapterError, match="it saves 'ranker', which this model does not have"):
        load_adapter(bert(), tmp_path)


def test_saving_into_the_base_model_s_own_folder_says_what_follows(tmp_path):
    bert().save_pretrained(tmp_path)
    model = adapted("bert")
    with pytest.warns(UserWarning, match=r"holds a whole model.*a folder of its own"):
        model.save_pretrained(tmp_path)


def test_an_adapter_of_fastspec_may_lie_in_its_base_model_s_folder(tmp_path):
    base = bert()
    base.save_pretrained(tmp_path)
    model = fastspec.spectralize(bert(), fastspec.SpectralConfig(rank=4))
    shift(model)
    fastspec.save_adapter(model, tmp_path)
    again = type(base).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again), output(base))
    assert torch.equal(output(fastspec.load_adapter(again, tmp_path)), output(model))


def test_without_the_import_peft_knows_no_such_method(tmp_path):
    """What the page says of it: the error names the method, and nothing was loaded."""
    adapted("mlp").save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "KeyError: 'FASTSPEC'" in found.stderr
    code = f"import fastspec.peft; {code}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class TestParameterGroups:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("bias", ["none", "all"])
    def test_know_coefficients_and_heads_by_peft_s_names(self, case, bias):
        model = adapted(case, bias=bias)
        groups = fastspec.parameter_groups(model, lr=3e-2, head_lr=1e-3, bias_lr=2e-3)
        rates = {g["name"]: g["lr"] for g in groups}
        wanted = {"coefficients": 3e-2, "head": 1e-3, "extra": 2e-3}
        absent = {"head"} if case == "gpt2" else set()
        absent |= {"extra"} if bias == "none" else set()
        assert rates == {k: v for k, v in wanted.items() if k not in absent}
        counts = dict.fromkeys(rates, 0)
        for group in groups:
            counts[group["name"]] += len(group["params"])
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert counts["coefficients"] == sum(".fastspec_delta." in n for n in names)
        assert sum(counts.values()) == len(names)

    def test_of_transformers_own_adapters(self):
        model = bert()
        model.add_adapter(SpectralConfig(r=4, modules_to_save=["classifier"]), "rte")
        groups = fastspec.parameter_groups(model, lr=3e-2, head_lr=1e-3)
        assert {g["name"]: g["lr"] for g in groups} == {"coefficients": 3e-2, "head": 1e-3}

    def test_other_methods_are_not_ours(self):
        model = get_peft_model(mlp(), LoraConfig(target_modules=["lin0"]))
        with pytest.raises(ValueError, match="no spectral adapter"):
            fastspec.parameter_groups(model, lr=1e-3)
        model = get_peft_model(mlp(), mlp_config(modules_to_save=None, inference_mode=True))
        with pytest.raises(ValueError, match="no parameter of the model requires"):
            fastspec.parameter_groups(model, lr=1e-3)
