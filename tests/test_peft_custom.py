"""The PEFT bridge: what PEFT's own tests of custom models ask of a method, over models of many layers."""

import copy
import pickle

import pytest
import torch
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft_models import CASES, attending, convolved, convolved1d, deep, embedded, normed
from peft_support import layers, shift
from support import assert_close
from torch import Tensor, nn

from fastspec.peft import SpectralConfig, convert_to_lora, load_adapter

every_case = pytest.mark.parametrize("case", CASES)


def base(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().eval()


def config(case: str, **options) -> SpectralConfig:
    return SpectralConfig(**({"r": 2} | copy.deepcopy(CASES[case][1]) | options))


def adapted(case: str, seed: int | None = 0, name: str = "default", **options) -> PeftModel:
    model = get_peft_model(base(case), config(case, **options), name).eval()
    if seed is not None:
        shift(model, seed)
    return model


@torch.no_grad()
def run(model: nn.Module, **kwargs) -> Tensor:
    x = (
        model.x.to(next(p.dtype for p in model.parameters()))
        if model.x.is_floating_point()
        else model.x
    )
    return model(x, **kwargs)


@every_case
def test_fresh_it_is_the_base_and_shows_what_the_base_shows(case):
    plain, model = base(case), adapted(case, None)
    assert torch.equal(run(model), run(plain))
    for name in model.base_model.targeted_module_names:
        layer, own = model.base_model.model.get_submodule(name), plain.get_submodule(name)
        assert torch.equal(layer.weight, own.weight)
        assert own.bias is None or torch.equal(layer.bias, own.bias)
        assert (layer.in_features, layer.out_features) == tuple(layer.base_matrix().shape)[::-1]
    model.print_trainable_parameters()
    assert model.get_layer_status()
    assert model.get_model_status().enabled


@every_case
@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda o: o.__name__
)
def test_training_moves_every_part_of_the_adapter_and_nothing_else(case, optimizer):
    torch.manual_seed(1)
    model = adapted(case, None).train()
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(4):
        steps.zero_grad()
        model(model.x).square().sum().backward()
        steps.step()
    after = model.state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    wanted = {n for n in before if ".fastspec_delta." in n or ".modules_to_save." in n}
    # as far as the loss depends on it: a bias before a norm's mean, say, does not
    assert {n for n in wanted if "_delta" in n} <= moved <= wanted
    assert {n.rpartition(".")[0] for n in wanted} == {n.rpartition(".")[0] for n in moved}


@every_case
@pytest.mark.parametrize("name", ["default", "spec", "del"])  # PEFT finds tensors by parts of names
def test_a_folder_and_back(tmp_path, case, name):
    model = adapted(case, name=name)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    y = run(model)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(base(case), folder, name, low_cpu_mem_usage=low)
        assert torch.equal(run(loaded), y)
        assert not any(p.requires_grad for p in loaded.parameters())
    if CASES[case][1].get("modules_to_save") != ["conv2d"]:
        safe = load_adapter(base(case), folder, "other", is_trainable=True)
        assert torch.equal(run(safe.eval()), y)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {
            n.replace(".other", f".{name}") for n, p in safe.named_parameters() if p.requires_grad
        } == trained


@every_case
def test_a_state_dict_and_a_pickle_and_back(case):
    model = adapted(case)
    y = run(model)
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), y)
    other = adapted(case, seed=9)
    assert not torch.equal(run(other), y)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(run(other), y)


@every_case
def test_the_base_s_weights_come_back_after_a_change_of_them(case):
    model = adapted(case)
    state, y = base(case).state_dict(), run(model)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(0.1)
    assert not any(set_base_model_state_dict(model, state, strict=False))
    found = get_base_model_state_dict(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    set_peft_model_state_dict(model, get_peft_model_state_dict(adapted(case)))
    assert torch.equal(run(model), y)


@every_case
def test_injected_directly(case):
    state = {
        n.removeprefix("base_model.model."): t
        for n, t in get_peft_model_state_dict(adapted(case)).items()
    }
    plain = inject_adapter_in_model(config(case), base(case)).eval()
    assert not set_peft_model_state_dict(plain, state).unexpected_keys
    assert torch.equal(run(plain), run(adapted(case)))


@every_case
@pytest.mark.parametrize("train", [False, True], ids=["", "train"])
def test_merging(case, train):
    model = adapted(case)
    y = run(model)
    model.train(train).merge_adapter(safe_merge=True)
    with pytest.warns(UserWarning, match="(?i)already"):
        model.merge_adapter()
    assert_close(run(model.eval()), y)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert torch.equal(run(model), y)
    plain = model.merge_and_unload()
    assert plain.state_dict().keys() == base(case).state_dict().keys()
    assert_close(run(plain), y)
    assert not hasattr(plain, "peft_config")


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_merging_in_other_precisions(case, dtype):
    model = get_peft_model(base(case).to(dtype), config(case)).eval()
    shift(model, scale=0.1)
    y = run(model)
    assert y.dtype == dtype
    assert all(m.fastspec_delta["default"].dtype == torch.float32 for m in layers(model))
    assert_close(run(model.merge_and_unload()), y, dtype)


@every_case
def test_unloaded_it_can_be_adapted_again(case):
    plain = adapted(case, modules_to_save=None).unload()
    assert torch.equal(run(plain), run(base(case)))
    again = get_peft_model(plain, config(case)).eval()
    assert torch.equal(run(again), run(base(case)))


@every_case
def test_disabling(case):
    model, plain = adapted(case), run(base(case))
    y = run(model)
    assert not torch.allclose(y, plain)
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
        with model.disable_adapter():
            assert torch.equal(run(model), plain)
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), y)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), y)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n in dict(model.named_parameters()) if "_delta" in n or ".modules_to_save." in n
    }


@every_case
def test_several_adapters(tmp_path, case):
    model = adapted(case)
    y = run(model)
    model.add_adapter("other", config(case, r=1))
    assert torch.equal(run(model), y)
    model.set_adapter("other")
    assert torch.equal(run(model), run(base(case)))
    shift(model, 3)
    z = run(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(case), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name, wanted in (("other", z), ("default", y)):
        loaded.set_adapter(name)
        model.set_adapter(name)
        assert torch.equal(run(loaded), wanted)
        assert torch.equal(run(model), wanted)
    if not CASES[case][1].get("modules_to_save"):
        both = model.merge_and_unload(adapter_names=["default", "other"])
        loaded.base_model.set_adapter(["default", "other"])
        assert_close(run(both), run(loaded))
        loaded.set_adapter("default")
    loaded.delete_adapter("default")
    assert torch.equal(run(loaded), z)
    assert not any("default" in n for n in loaded.state_dict())
    loaded.delete_adapter(
        "other"
    )  # PEFT's own model asks for an active one, which there is not any more
    assert torch.equal(run(loaded.base_model.model), run(base(case)))


@every_case
def test_a_mixed_batch(case):
    model = adapted(case)
    model.add_adapter("other", config(case))
    outputs = {"__base__": run(base(case)), "default": run(model)}
    model.set_adapter("other")
    shift(model, 3)
    outputs["other"] = run(model)
    names = ["default", "__base__", "other", "other", "default", "__base__"]
    try:
        mixed = run(model, adapter_names=names)
    except TypeError as e:
        assert "Mixed batching is only supported" in str(e)  # noqa: PT017 - PEFT's wrapper of a norm
        assert case == "norm saved"
        return
    for row, name in enumerate(names):
        assert_close(mixed[row], outputs[name][row])


@every_case
def test_as_lora(tmp_path, case):
    model = adapted(case)
    y = run(model)
    lora, tensors = convert_to_lora(model)
    other = get_peft_model(base(case), lora).eval()
    assert not set_peft_model_state_dict(other, tensors).unexpected_keys
    assert_close(run(other), y)


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (embedded, "emb", "emb: Embedding is not supported"),
        (convolved, "conv2d", "conv2d: Conv2d is not supported"),
        (convolved1d, "conv1d", "conv1d: Conv1d is not supported"),
        (attending, "mha", "mha: MultiheadAttention is not supported"),
        (attending, "out_proj", "mha.out_proj: nn.MultiheadAttention reads"),
        (normed, "norm", "norm: LayerNorm is not supported"),
        (deep, "layers", "layers: Sequential is not supported"),
    ],
    ids=lambda v: v if isinstance(v, str) and ":" not in v else "",
)
def test_what_is_no_linear_layer_is_refused_by_name(make, target, message):
    model = make().eval()
    before, y = list(model.modules()), run(model)
    with pytest.raises((TypeError, ValueError), match=message):
        get_peft_model(model, SpectralConfig(r=2, target_modules=[target]))
    assert list(model.modules()) == before
    assert torch.equal(run(model), y)
    assert all(p.requires_grad for p in model.parameters())
