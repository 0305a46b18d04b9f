"""In PEFT too, what is trained or moves beside the coefficients is saved, loads, and is one for all."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_support import PREFIX, mlp_config, shift
from safetensors.torch import load_file, save_file
from tiny_models import Late, gpt2, mlp
from torch import nn

import fastspec.peft
from fastspec.model.adapter_file import AdapterError
from fastspec.peft import SpectralConfig

X = torch.randn(8, 10, generator=torch.Generator().manual_seed(1))
LOADERS = [PeftModel.from_pretrained, fastspec.peft.load_adapter]
by_either_loader = pytest.mark.parametrize("load", LOADERS)


def moving():
    model = mlp()
    model.lin1 = nn.Sequential(nn.BatchNorm1d(20), model.lin1)
    return model.eval()


def config(**options):
    return mlp_config(target_modules=["lin0", "lin1.1"], **options)


def moved(model):
    shift(model)
    for i in range(5):
        model.train()(2 * X + i)
    return model.eval()


@by_either_loader
def test_running_statistics_are_saved_and_load(tmp_path, load):
    model = moved(get_peft_model(moving(), config()))
    model.save_pretrained(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert f"{PREFIX}lin1.0.running_mean" in stored
    loaded = load(moving(), tmp_path / "a").eval()
    assert torch.equal(loaded(X), model(X))
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == stored.keys()


@by_either_loader
def test_statistics_of_a_module_to_save_are_its_own(tmp_path, load):
    model = moved(get_peft_model(moving(), config(modules_to_save=["head", "lin1.0"])))
    model.save_pretrained(tmp_path)
    loaded = load(moving(), tmp_path).eval()
    assert torch.equal(loaded(X), model(X))
    assert loaded.load_adapter(tmp_path, "other") is not None  # one more with a copy of its own


@by_either_loader
def test_a_parameter_unfrozen_by_hand_is_saved_and_loads(tmp_path, load):
    model = get_peft_model(moving(), config())
    bias = model.base_model.model.lin0.base_layer.bias.requires_grad_(True)
    norm = model.base_model.model.lin1[0].weight.requires_grad_(True)
    shift(model)
    assert not torch.equal(bias, moving().lin0.bias)
    assert not torch.equal(norm, moving().lin1[0].weight)
    model.save_pretrained(tmp_path / "a")
    loaded = load(moving(), tmp_path / "a").eval()
    assert torch.equal(loaded(X), model.eval()(X))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load(moving(), tmp_path / "again").eval()(X), model(X))


def test_a_trained_weight_below_its_own_basis_is_refused(tmp_path):
    model = get_peft_model(moving(), config())
    model.base_model.model.lin0.base_layer.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"lin0\.base_layer\.weight is trainable, and the layer's bas"
    ):
        model.save_pretrained(tmp_path)


@by_either_loader
def test_other_statistics_are_refused_below_adapters(tmp_path, load):
    get_peft_model(moving(), config()).save_pretrained(tmp_path / "still")
    moved(get_peft_model(moving(), config())).save_pretrained(tmp_path / "moved")
    model = load(moving(), tmp_path / "still").eval()
    y = model(X)
    with pytest.raises(
        AdapterError, match=r"another lin1\.0\.running_mean than the model's adapters"
    ):
        fastspec.peft.load_adapter(model, tmp_path / "moved", "second")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(
        AdapterError, match=r"another lin1\.0\.running_mean than the model's adapters"
    ):
        model.load_adapter(tmp_path / "moved", "second")
    assert torch.equal(model(X), y)
    model = load(moving(), tmp_path / "moved").eval()
    with pytest.raises(
        AdapterError, match=r"another lin1\.0\.running_mean than the model's adapters"
    ):
        model.load_adapter(tmp_path / "still", "second")


def test_a_folder_names_no_weight_of_its_layers(tmp_path):
    get_peft_model(moving(), config()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file) | {f"{PREFIX}lin0.base_layer.weight": torch.zeros(20, 10)}
    save_file(tensors, file, {"format": "pt"})
    base = moving()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(AdapterError, match=r"another weight of .lin0. than"):
        fastspec.peft.load_adapter(base, tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


@pytest.mark.parametrize("saved", ["lm_head", "wte"])
def test_tied_embeddings_saved_whole(tmp_path, saved):
    ids = torch.arange(16).reshape(2, 8)
    options = {"task_type": "CAUSAL_LM", "r": 4, "modules_to_save": [saved]}
    model = get_peft_model(gpt2(), SpectralConfig(**options)).eval()
    shift(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    # the loaded one is not trainable, which is another plan
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_transformers_adapters(tmp_path):
    from tiny_models import bert

    ids = torch.arange(16).reshape(2, 8)

    def base():
        model = bert()
        model.bert.embeddings.norm2 = nn.BatchNorm1d(8)
        plain = model.bert.embeddings.forward
        model.bert.embeddings.forward = lambda *a, **k: model.bert.embeddings.norm2(plain(*a, **k))
        return model.eval()

    model = base()
    model.add_adapter(SpectralConfig(r=4, modules_to_save=["classifier"]), "rte")
    shift(model)
    model.train()(ids)
    model.eval().save_pretrained(tmp_path)
    again = base()
    again.load_adapter(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


@by_either_loader
def test_a_buffer_that_is_made_late(tmp_path, load):
    def late():
        model = mlp()
        model.lin1 = nn.Sequential(Late(), model.lin1)
        return model.eval()

    model = moved(get_peft_model(late(), config()))
    model.save_pretrained(tmp_path)
    assert f"{PREFIX}lin1.0.scale" in load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(load(late(), tmp_path).eval()(X), model(X))


def test_extra_state_that_moved_is_not_lost(tmp_path):
    class Counting(nn.Identity):
        calls = 0

        def get_extra_state(self):
            return self.calls

        def set_extra_state(self, state):
            self.calls = state

        def forward(self, x):
            self.calls += self.training
            return x + self.calls

    def counting():
        model = mlp()
        model.lin1 = nn.Sequential(Counting(), model.lin1)
        return model.eval()

    model = get_peft_model(counting(), config())
    model.save_pretrained(tmp_path / "a")
    model.train()(X)
    with pytest.raises(ValueError, match=r"lin1\.0\._extra_state has changed"):
        model.save_pretrained(tmp_path / "b")


@by_either_loader
def test_an_adapted_output_layer_tied_to_the_embeddings(tmp_path, load):
    """PEFT writes its base weight into the folder."""
    ids = torch.arange(16).reshape(2, 8)
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["lm_head", "c_attn"]}
    model = get_peft_model(gpt2(), SpectralConfig(**options)).eval()
    shift(model)
    model.save_pretrained(tmp_path)
    key = f"{PREFIX}lm_head.base_layer.weight"
    assert key in load_file(tmp_path / "adapter_model.safetensors")
    loaded = load(gpt2(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_made_under_inference_mode_it_trains():
    base = mlp()
    with torch.inference_mode():
        model = get_peft_model(base, mlp_config(modules_to_save=None))
    model(X).square().sum().backward()
    deltas = [p for n, p in model.named_parameters() if "fastspec_delta" in n]
    assert deltas
    assert all(p.grad is not None for p in deltas)
