"""The PEFT bridge: `add_weighted_adapter`, exact in one basis and refused elsewhere."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_support import CORES, layers, mlp_config, output, shift
from support import assert_close
from tiny_models import mlp

from fastspec.peft import load_adapter


def several(*options: dict, **common):
    """An MLP with adapters a, b, ... of these options, each shifted by numbers of its own."""
    model = None
    for seed, (name, own) in enumerate(zip("abc", options, strict=False)):
        config = mlp_config(**({"modules_to_save": None} | common | own))
        if model is None:
            model = get_peft_model(mlp(), config, name).eval()
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        shift(model, seed)
    model.set_adapter("a")
    return model


@pytest.mark.parametrize("core", CORES, ids=lambda o: o["core"])
@pytest.mark.parametrize(
    "weights", [[1.0, 1.0], [0.0, 1.0], [5.0, 0.01], [-1.0, -1.0], [0.5, -0.3]]
)
def test_the_sum_is_exact_and_lives_on_its_own(tmp_path, core, weights):
    model = several({}, {}, **core)
    model.add_weighted_adapter(["a", "b"], weights, "sum")
    assert model.active_adapters == ["a"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum" in n)
    model.set_adapter("sum")
    plain = mlp()
    with torch.no_grad():
        for name in ("lin0", "lin1"):
            layer = model.base_model.model.get_submodule(name)
            assert layer.fastspec_basis["sum"] is layer.fastspec_basis["a"]
            for adapter, weight in zip("ab", weights, strict=True):
                plain.get_submodule(name).weight += weight * layer.get_delta_weight(adapter)
    y = output(model)
    assert_close(y, output(plain))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    model.delete_adapter("a")
    model.delete_adapter("b")
    assert torch.equal(output(model), y)
    assert torch.equal(output(PeftModel.from_pretrained(mlp(), tmp_path / "sum")), y)
    assert torch.equal(output(load_adapter(mlp(), tmp_path / "sum")), y)


@pytest.mark.parametrize("core", [CORES[0], CORES[-1]], ids=lambda o: o["core"])
def test_layers_that_only_some_have(core):
    model = several({"target_modules": ["lin0"]}, {"target_modules": ["lin1"], "r": 3}, **core)
    model.add_weighted_adapter(["a", "b", "b"], [1.0, 2.0, -1.0], "sum")
    model.base_model.set_adapter(["a", "b"])
    y = output(model)
    model.set_adapter("sum")
    assert_close(output(model), y)
    assert [m.fastspec_delta["sum"].shape[-1] for m in layers(model)] == [4, 3]
    assert model.peft_config["sum"].core_rank == (6 if core["core"] == "low_rank" else 1)


def test_the_head_that_one_of_them_has_goes_along():
    model = several({"modules_to_save": ["head"]}, {})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "sum")
    y = output(model)
    model.set_adapter("sum")
    assert torch.equal(output(model), y)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"core": "dense"}, "core differs: {'a': 'diag', 'b': 'dense'}"),
        ({"seed": 1}, "seed differs"),
        ({"select": "trailing"}, "select differs"),
        ({"r": 3}, r"lin0: .* the shapes differ: \{'a': \[4\], 'b': \[3\]\}"),
        ({"bias": "all"}, "'b' trains biases"),
        ({"modules_to_save": ["head"]}, "a, b have each a 'head' of their own"),
    ],
    ids=str,
)
def test_what_would_not_be_exact_is_refused(other, message):
    model = several({"modules_to_save": ["head"]} if "modules_to_save" in other else {}, other)
    names = list(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["a", "b"]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in names]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((["a", "z"], [1, 1], "sum"), "z does not exist; there are a"),
        ((["a"], [1, 1], "sum"), "as many finite weights as adapters"),
        (([], [], "sum"), "one at least"),
        ((["a"], [float("nan")], "sum"), "finite weights"),
        ((["a"], [1], "a"), "'a' is there already"),
        ((["a"], [1], "sum", "svd"), "only 'linear' is there"),
    ],
    ids=str,
)
def test_arguments(args, message):
    with pytest.raises(ValueError, match=message):
        several({}).add_weighted_adapter(*args)
