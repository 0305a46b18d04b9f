"""Behaviours that PEFT's own tests ask of every method, as far as the other files do not."""

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft_support import CASES, IDS, PREFIX, adapted, layers, mlp_config, output, shift
from support import assert_close
from tiny_models import mlp


def two_adapters():
    """An MLP with `default` and `other`, both shifted, without heads of their own."""
    model = get_peft_model(mlp(), mlp_config(modules_to_save=None)).eval()
    model.add_adapter("other", mlp_config(modules_to_save=None, r=3))
    for seed, name in enumerate(("other", "default")):
        model.set_adapter(name)
        shift(model, seed)
    return model


def trained(model):
    return {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_the_whole_state_dict_carries_a_model_over(case):
    model, other = adapted(case), adapted(case, seed=9)
    assert not torch.equal(output(other), output(model))
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(output(other), output(model))


@pytest.mark.parametrize("case", CASES)
def test_outputs_in_training_mode_are_finite_and_reach_every_coefficient(case):
    model = adapted(case).train()
    y = output(model)
    assert torch.isfinite(y).all()
    y.square().mean().backward()
    for layer in layers(model):
        assert layer.fastspec_delta["default"].grad.any()


class TestDisabling:
    def test_leaving_the_context_restores_what_was_before(self):
        model, base = adapted("mlp", modules_to_save=None), output(mlp())
        y = output(model)
        model.base_model.disable_adapter_layers()
        with model.disable_adapter():
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base), "it was disabled before"
        model.base_model.enable_adapter_layers()
        assert torch.equal(output(model), y)

    def test_an_error_inside_restores_it_too(self):
        model = adapted("mlp")
        y, names = output(model), trained(model)
        with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
            raise RuntimeError("inside")
        assert torch.equal(output(model), y)
        assert trained(model) == names

    def test_switching_while_disabled_takes_effect_afterwards(self):
        model = two_adapters()
        model.set_adapter("other")
        y = output(model)
        model.set_adapter("default")
        with model.disable_adapter():
            model.set_adapter("other")
            assert torch.equal(output(model), output(mlp()))
        assert torch.equal(output(model), y)


class TestRequiresGrad:
    def test_by_name_without_a_change_of_the_active_one(self):
        model = two_adapters()
        assert trained(model) == {"default"}
        model.set_requires_grad("other")
        assert trained(model) == {"default", "other"}
        model.set_requires_grad(["default", "other"], requires_grad=False)
        assert trained(model) == set()
        assert model.active_adapters == ["default"]

    def test_activated_for_inference_nothing_trains(self):
        model = two_adapters()
        model.set_adapter("other", inference_mode=True)
        assert trained(model) == set()
        model.set_adapter("other")
        assert trained(model) == {"other"}

    @pytest.mark.parametrize("is_trainable", [False, True])
    def test_loaded_adapters_train_only_when_asked(self, tmp_path, is_trainable):
        adapted("mlp").save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=is_trainable)
        assert any(p.requires_grad for p in model.parameters()) == is_trainable


class TestMerging:
    def test_one_by_one_is_both(self):
        model = two_adapters()
        model.base_model.set_adapter(["default", "other"])
        y = output(model)
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="additionally merging other"):
            model.merge_adapter(["other"])
        assert all(layer.merged_adapters == ["default", "other"] for layer in layers(model))
        assert_close(output(model), y)
        model.unmerge_adapter()
        assert torch.equal(output(model), y)

    def test_twice_is_once_and_says_so(self):
        model = two_adapters()
        model.merge_adapter()
        y = output(model)
        with pytest.warns(UserWarning, match="(?i)already"):
            model.merge_adapter()
        assert torch.equal(output(model), y)

    def test_unloading_a_selection(self):
        model = two_adapters()
        y = output(model)
        model.set_adapter("other")
        plain = model.merge_and_unload(adapter_names=["default"])
        assert plain.state_dict().keys() == mlp().state_dict().keys()
        assert_close(output(plain), y)

    def test_merged_in_training_mode(self):
        model = adapted("mlp", modules_to_save=None).train()
        y = output(model)
        assert_close(output(model.merge_and_unload()), y)


def test_only_one_adapter_may_train_biases():
    model = get_peft_model(mlp(), mlp_config(bias="all"))
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("other", mlp_config(bias="all"))


def test_embedded_inputs():
    model = adapted("bert")
    embedded = model.get_input_embeddings()(IDS)
    assert_close(model(inputs_embeds=embedded).logits, output(model))


def test_injected_without_memory_and_filled_from_a_state_dict():
    source = adapted("mlp", modules_to_save=None)
    state = {n.removeprefix(PREFIX): t for n, t in get_peft_model_state_dict(source).items()}
    config = mlp_config(modules_to_save=None)
    model = inject_adapter_in_model(config, mlp(), low_cpu_mem_usage=True).eval()
    assert all(layer.fastspec_delta["default"].is_meta for layer in layers(model))
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert torch.equal(output(model), output(source))


def test_the_status_of_layers():
    first, *_ = two_adapters().get_layer_status()
    assert first.name == "model.lin0"
    assert first.available_adapters == ["default", "other"]
    assert first.active_adapters == ["default"]
    assert first.requires_grad == {"default": True, "other": False}


def test_a_model_card_is_written_and_one_that_is_there_kept(tmp_path):
    (tmp_path / "README.md").write_text("about my task\n")
    adapted("bert").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "about my task" in text
    assert "library_name: peft" in text
