"""The PEFT bridge: several adapters on one model, and what PEFT asks about them."""

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import replicate_layers
from peft_support import PREFIX, adapted, layers, mlp_config, output, shift
from support import assert_close
from tiny_models import bert, mlp

from fastspec.peft import SpectralConfig


def test_switching_deleting_and_their_independence():
    model = adapted("bert")
    y = output(model)
    model.add_adapter("other", SpectralConfig(r=2, core="dense", task_type="SEQ_CLS"))
    assert torch.equal(output(model), y)
    model.set_adapter("other")
    assert torch.equal(output(model), output(bert()))
    shift(model, 5)
    z = output(model)
    assert not torch.allclose(z, y)
    model.set_adapter("default")
    assert torch.equal(output(model), y)
    model.delete_adapter("default")
    assert torch.equal(output(model), z)
    assert all(list(m.fastspec_basis) == list(m.fastspec_form) == ["other"] for m in layers(model))


def test_only_the_active_one_trains():
    model = adapted("mlp")
    model.add_adapter("other", mlp_config())
    for name in ("other", "default"):
        model.set_adapter(name)
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all(f".{name}" in n for n in trained)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ({"r": 6}, {"r": 4, "core": "dense"}, True),
        ({"r": 4}, {"r": 6}, False),
        ({"r": "full"}, {"r": 3, "select": "trailing"}, True),
        ({"r": "full"}, {"select": (2, 7)}, True),
        ({"r": 6}, {"select": (4, 7)}, False),
        ({"r": 6}, {"r": 6, "seed": 1}, False),
        ({"r": 6, "basis": "random"}, {"r": 6, "basis": "random"}, True),
        ({"r": 6, "basis": "random"}, {"r": 4, "basis": "random"}, False),
    ],
    ids=str,
)
def test_one_basis_serves_all_whose_directions_it_holds(monkeypatch, first, second, shared):
    from fastspec.peft import model as peft_model

    model = adapted("mlp", **first)
    factorized = []
    real = peft_model.factorize

    def watched(matrices, *args, **kwargs):
        factorized.extend(matrices)
        return real(matrices, *args, **kwargs)

    monkeypatch.setattr(peft_model, "factorize", watched)
    model.add_adapter("other", mlp_config(**second))
    assert len(factorized) == (0 if shared else 2)
    model.set_adapter("other")
    shift(model, 5)
    alone = get_peft_model(mlp(), mlp_config(**second)).eval()
    for mine, theirs in zip(layers(model), layers(alone), strict=True):
        assert (mine.fastspec_basis["other"] is mine.fastspec_basis["default"]) == shared
        theirs.fastspec_delta["default"] = mine.fastspec_delta["other"]
    head = model.base_model.model.head.modules_to_save["other"]
    alone.base_model.model.head.modules_to_save["default"] = head
    # the same singular triplets to the tolerance of their residual
    torch.testing.assert_close(output(model), output(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("second", [{}, {"r": 3, "core": "dense"}], ids=["alike", "unlike"])
def test_active_together_they_add_up(second):
    model = get_peft_model(mlp(), mlp_config(modules_to_save=None)).eval()
    model.add_adapter("other", mlp_config(modules_to_save=None, **second))
    for name in ("default", "other"):
        model.set_adapter(name)
        shift(model, 7)
    model.base_model.set_adapter(["default", "other"])
    y = output(model)
    plain = mlp()
    with torch.no_grad():
        for name in ("lin0", "lin1"):
            layer = model.base_model.model.get_submodule(name)
            for adapter in ("default", "other"):
                plain.get_submodule(name).weight += layer.get_delta_weight(adapter)
    assert_close(y, output(plain))
    y.sum().backward()
    assert all(p.grad is not None for m in layers(model) for p in m.fastspec_delta.values())
    model.merge_adapter()
    assert_close(output(model), y)


def test_layers_that_share_a_weight_share_its_basis():
    base = bert()
    replicate_layers(base, [[0, 2], [0, 2]])
    model = get_peft_model(base, SpectralConfig(r=4, task_type="SEQ_CLS")).eval()
    encoder = model.base_model.model.bert.encoder.layer
    first, again = encoder[0].output.dense, encoder[2].output.dense
    assert first.fastspec_basis["default"] is again.fastspec_basis["default"]
    assert first.fastspec_delta["default"] is not again.fastspec_delta["default"]


def test_deleting_an_inactive_one_an_unknown_one_and_the_last():
    model = adapted("bert")
    y = output(model)
    model.add_adapter("other", SpectralConfig(r=4, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("other", SpectralConfig(r=4, task_type="SEQ_CLS"))
    model.delete_adapter("other")
    assert torch.equal(output(model), y)
    with pytest.raises(ValueError, match="other does not exist"):
        model.delete_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(output(model.base_model.model), output(bert()))
    assert not any(list(layer.buffers()) for layer in layers(model))  # the basis has gone too


def test_saving_a_selection(tmp_path):
    model = adapted("mlp")
    model.add_adapter("other", mlp_config())
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_status():
    model = adapted("mlp", modules_to_save=None)
    model.add_adapter("other", mlp_config(modules_to_save=None))
    status = model.get_model_status()
    assert status.peft_types == {"default": "FASTSPEC", "other": "FASTSPEC"}
    assert status.available_adapters == ["default", "other"]
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (
        True,
        ["default"],
        [],
    )
    assert status.requires_grad == {"default": True, "other": False}
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]


def test_adapters_of_another_method_do_not_mix():
    with pytest.raises(ValueError, match="different peft types"):
        adapted("mlp").add_adapter("lora", LoraConfig(target_modules=["lin0"]))


@pytest.mark.parametrize("by_keys", [False, True], ids=["config", "state dict"])
def test_injection_without_a_peft_model(by_keys):
    trained = adapted("mlp", modules_to_save=None)
    state = get_peft_model_state_dict(trained)
    state = {name.removeprefix(PREFIX): t for name, t in state.items()}
    model = inject_adapter_in_model(
        mlp_config(modules_to_save=None), mlp(), state_dict=state if by_keys else None
    ).eval()
    assert torch.equal(output(model), output(mlp()))
    assert not set_peft_model_state_dict(model, state).unexpected_keys
    assert torch.equal(output(model), output(trained))


def test_weight_and_bias_are_reached_past_the_wrapper():
    layer, plain = layers(adapted("mlp"))[0], mlp().lin0
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)
