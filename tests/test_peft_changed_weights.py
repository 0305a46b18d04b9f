"""Base weights that change under PEFT's bridge: bases follow them, or the bridge says what to do."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_support import X, adapted, layers, mlp_config, output, shift
from support import assert_close
from tiny_models import mlp
from torch import nn

import fastspec.peft.state as state
from fastspec.model.adapter_file import AdapterError

OTHER = torch.randn(20, 10, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def made(monkeypatch) -> list:
    """The bases that layers have made again on their own."""
    calls: list = []
    plain = state.factorize

    def counted(*args, **kwargs):
        calls.append(args)
        return plain(*args, **kwargs)

    monkeypatch.setattr(state, "factorize", counted)
    return calls


def gradients(model):
    model.zero_grad()
    output(model).square().sum().backward()
    return [layer.fastspec_delta["default"].grad.clone() for layer in layers(model)]


def fresh(model):
    """The model as it should be: adapted anew from the weights as they are, with the same coefficients."""
    base = mlp()
    inner = model.base_model.model
    with torch.no_grad():
        for name in ("lin0", "lin1"):
            base.get_submodule(name).weight.copy_(inner.get_submodule(name).base_layer.weight)
    wanted = get_peft_model(base, mlp_config(r=10))
    kept = {n: p for n, p in model.named_parameters() if "base_layer" not in n}
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
    return wanted.eval()


def assert_follows(model):
    wanted = fresh(model)
    assert_close(output(model), output(wanted))
    for got, exact in zip(gradients(model), gradients(wanted), strict=True):
        assert_close(got, exact)


def copied(layer):
    with torch.no_grad():
        layer.base_layer.weight.copy_(OTHER)


def replaced(layer):
    layer.base_layer.weight = nn.Parameter(OTHER.clone(), requires_grad=False)


def data_replaced(layer):
    layer.base_layer.weight.data = OTHER.clone()


def loaded(layer):
    layer.base_layer.load_state_dict({"weight": OTHER.clone()}, strict=False)


@pytest.fixture
def model():
    return adapted("mlp", seed=None, r=10)  # a complete basis of lin0


@pytest.mark.parametrize("change", [copied, replaced, data_replaced, loaded])
def test_bases_follow_the_weight(model, change):
    change(layers(model)[0])
    assert_follows(model)


def test_coefficients_that_are_not_zero_are_spoken_of(model):
    shift(model)
    copied(layers(model)[0])
    with pytest.warns(UserWarning, match="lin0: the base weight has changed since the basis was"):
        output(model)
    assert_follows(model)


def test_adapters_share_the_new_basis_as_they_did_the_old(model, made):
    model.add_adapter("narrow", mlp_config(r=3))
    model.base_model.set_adapter("default")
    copied(layers(model)[0])
    model(X, adapter_names=["default", "narrow", "__base__", *["narrow"] * 5])
    first = layers(model)[0]
    assert first.fastspec_basis["default"] is first.fastspec_basis["narrow"]
    assert len(made) == 1


def test_layers_that_shared_a_weight_part_with_it():
    base = mlp()
    base.lin0, base.lin1 = nn.Linear(10, 10), nn.Linear(10, 10)
    base.lin1.weight = base.lin0.weight
    base.head = nn.Linear(10, 2)
    model = get_peft_model(base, mlp_config()).eval()
    first, second = layers(model)
    assert first.fastspec_basis["default"] is second.fastspec_basis["default"]
    kept = first.factors("default").u.clone()
    second.base_layer.weight = nn.Parameter(torch.randn(10, 10), requires_grad=False)
    output(model)
    assert torch.equal(first.factors("default").u, kept)
    assert not torch.equal(second.factors("default").u, kept)


def test_the_base_state_dict_goes_back_in_after_the_weights_were_disturbed(model, made):
    shift(model)
    y = output(model)
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for layer in layers(model):
            layer.base_layer.weight.add_(1.0)
    assert not model.load_state_dict(kept).missing_keys
    assert torch.equal(output(model), y)
    assert not made


def test_also_after_it_was_called_disturbed(model):
    shift(model)
    y = output(model)
    kept = copy.deepcopy(model.base_model.model.state_dict())
    copied(layers(model)[0])
    with pytest.warns(UserWarning, match="lin0: the base weight has changed"):
        output(model)
    base_only = {name: t for name, t in kept.items() if "fastspec" not in name}
    model.base_model.model.load_state_dict(base_only, strict=False)
    with pytest.warns(UserWarning, match="lin0: the base weight has changed"):
        assert torch.equal(output(model), y)


def test_other_base_weights_alone_may_be_loaded(model):
    model.base_model.model.load_state_dict({"lin0.base_layer.weight": OTHER}, strict=False)
    assert_follows(model)


def test_other_base_weights_with_coefficients_may_be_a_merged_models(model):
    shift(model)
    model.merge_adapter()
    merged = copy.deepcopy(model.state_dict())
    model.unmerge_adapter()
    with pytest.raises(RuntimeError, match="the basis was made from other weights"):
        model.load_state_dict(merged)


def test_an_adapter_is_saved_with_what_its_basis_was_made_from(model, tmp_path):
    copied(layers(model)[0])
    output(model)
    shift(model)
    y = output(model)
    model.save_pretrained(tmp_path)
    changed = mlp()
    with torch.no_grad():
        changed.lin0.weight.copy_(OTHER)
    assert_close(output(PeftModel.from_pretrained(changed, tmp_path)), y)
    with pytest.raises(AdapterError, match="other base weights"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_a_change_after_the_last_call_is_not_the_saved_adapters(model, tmp_path):
    shift(model)
    y = output(model)
    copied(layers(model)[0])
    model.save_pretrained(tmp_path)
    assert_close(output(PeftModel.from_pretrained(mlp(), tmp_path)), y)


def test_a_merged_weight_changed_in_place_is_not_lost_silently(model):
    model.merge_adapter()
    with torch.no_grad():
        layers(model)[0].base_layer.weight.mul_(2)
    with pytest.raises(ValueError, match="changed in place while it was merged"):
        model.unmerge_adapter()


@pytest.mark.parametrize(
    "what",
    [
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda model: output(copy.deepcopy(model)),
        lambda model: output(pickle.loads(pickle.dumps(model))),
        lambda model: model.double().float(),
        lambda model: model.merge_adapter() or model.unmerge_adapter(),
        lambda model: model.add_adapter("narrow", mlp_config(r=3)),
    ],
)
def test_the_same_values_keep_their_bases(model, made, what):
    what(model)
    assert_follows(model)
    assert not made


def test_nothing_is_compared_from_step_to_step(model, monkeypatch):
    def forbidden(weight):
        raise AssertionError("contents were compared")

    monkeypatch.setattr("fastspec.nn.made_from.tensor_fingerprint", forbidden)
    for _ in range(3):
        gradients(model)


def test_an_emptied_model_gets_its_bases_again(model):
    kept = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for layer in layers(model):
            layer.fastspec_delta["default"].zero_()
            layer.base_layer.weight.zero_()
    model.load_state_dict(kept)
    assert_follows(model)


def test_a_copy_of_a_changed_model_tells_its_own_config(model):
    other = copy.deepcopy(model)
    copied(layers(other)[0])
    output(other)
    mine, theirs = (m.peft_config["default"].base_fingerprint for m in (model, other))
    assert mine != theirs
