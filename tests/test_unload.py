"""Merged models as ordinary ones: plain layers again, and what `save_pretrained` writes while merged."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from support import assert_close
from tiny_models import IDS, bert, gpt2, net, trained
from torch import nn

import fastspec
from fastspec import SpectralConfig, SpectralLinear, merge_and_unload, spectralize, unload

TOKENS = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(0))


def shifted(model: nn.Module, **options) -> nn.Module:
    """Adapted, its coefficients moved."""
    spectralize(model, SpectralConfig(rank=4, **options))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("delta"):
                parameter.copy_(torch.randn(parameter.shape, generator=g))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def described(model: nn.Module):
    """Classes, attributes and hooks of all modules, and shapes of the state."""
    modules = {
        name: (type(m), sorted(vars(m)), [sorted(h) for k, h in vars(m).items() if "hooks" in k])
        for name, m in model.named_modules()
    }
    return modules, {name: t.shape for name, t in model.state_dict().items()}


# ------------------------------------------------------------------------------------ plain layers


@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_gives_the_plain_architecture(merged_before):
    plain, model = net(), trained()
    y = model(IDS)
    if merged_before:
        fastspec.merge(model)
    assert merge_and_unload(model) is model
    assert described(model) == described(plain)
    assert_close(model(IDS), y)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(IDS), model(IDS))


@pytest.mark.parametrize("merged_before", [False, True])
def test_unload_gives_the_base_weights_back(merged_before):
    plain, model = net(), shifted(net())
    if merged_before:
        fastspec.merge(model)
    assert unload(model) is model
    assert described(model) == described(plain)
    assert torch.equal(model(IDS), plain(IDS))


@pytest.mark.parametrize("make", [bert, gpt2])
def test_models_of_transformers(make):
    model, plain = shifted(make()), make()
    y = logits(model)
    merge_and_unload(model)
    assert described(model) == described(plain)
    assert_close(logits(model), y)
    assert not torch.allclose(y, logits(plain))


def test_a_single_layer_is_returned_plain():
    layer = SpectralLinear(12, 16, rank=4)
    with torch.no_grad():
        layer.delta.fill_(1.0)
    x = torch.randn(3, 12)
    y = layer(x)
    plain = merge_and_unload(layer)
    assert type(plain) is nn.Linear
    assert_close(plain(x), y)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_class_attributes_hooks_and_places_come_back():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = OwnLinear(12, 12), nn.Linear(12, 12)
            self.again = self.first

        def forward(self, x):
            return self.again(self.second(self.first(x)))

    model, calls = Shared(), []
    before = model.first.register_forward_hook(lambda *_: calls.append("before"))
    model.first.note = "mine"
    shifted(model)
    after = model.first.register_forward_hook(lambda *_: calls.append("after"))
    model.eval()
    merge_and_unload(model)
    assert type(model.first) is OwnLinear
    assert model.again is model.first
    assert model.first.note == "mine"
    assert not model.first.training
    model.first(torch.randn(2, 12))
    assert calls == ["before", "after"]
    before.remove()
    after.remove()
    model.first(torch.randn(2, 12))
    assert calls == ["before", "after"]


def test_a_hook_of_accelerate_moves_to_the_plain_layer():
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    model = net()
    hooks.add_hook_to_module(model.blocks[0].up, Doubled())
    y = model(IDS)
    spectralize(model, SpectralConfig(rank=4))
    merge_and_unload(model)
    assert torch.equal(model(IDS), y)


def test_tied_layers_and_wrappers():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[1].weight = model[0].weight
    compiled = torch.compile(model, backend="eager")
    shifted(model)
    x = torch.randn(3, 12)
    y = model(x)
    assert unload(copy.deepcopy(model))[1].weight.shape == (12, 12)
    assert merge_and_unload(compiled) is compiled
    assert_close(model(x), y)
    assert model[0].weight is not model[1].weight


def test_unloading_keeps_tied_weights_tied():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[1].weight = model[0].weight
    unload(shifted(model))
    assert model[0].weight is model[1].weight


def test_the_fused_path_of_encoders_is_allowed_again():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    was = model.layers[0].activation_relu_or_gelu, model.use_nested_tensor
    shifted(model)
    assert model.layers[0].activation_relu_or_gelu == 0
    merge_and_unload(model)
    assert (model.layers[0].activation_relu_or_gelu, model.use_nested_tensor) == was


def test_it_can_be_adapted_again():
    model = merge_and_unload(trained())
    y = model(IDS)
    spectralize(model, SpectralConfig(rank=2))
    assert torch.equal(model(IDS), y)


def test_a_merged_weight_changed_in_place_is_kept():
    model = fastspec.merge(shifted(net()))
    with torch.no_grad():
        model.blocks[0].up.weight.zero_()
    with pytest.raises(ValueError, match="changed in place while it was merged"):
        unload(model)
    assert model.blocks[1].up.merged  # nothing was done
    merge_and_unload(model)
    assert not model.blocks[0].up.weight.any()


def test_a_weight_that_is_not_finite_merges_nothing():
    model = shifted(net())
    with torch.no_grad():
        model.blocks[1].down.delta[0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.down: the merged weight is not finite"):
        merge_and_unload(model)
    assert not model.blocks[0].up.merged


def test_a_model_with_tasks_is_refused():
    model = shifted(net())
    fastspec.add_task(model, "one", current=True)
    with pytest.raises(ValueError, match="the model holds tasks"):
        merge_and_unload(model)
    assert not model.blocks[0].up.merged


def test_quantised_weights_are_refused():
    torchao = pytest.importorskip("torchao.quantization")
    from fastspec.model.quantized import quantize_base

    model = quantize_base(shifted(net()), torchao.Int8WeightOnlyConfig())
    with pytest.raises(
        ValueError, match=r"blocks\.0\.up: merging needs the base weight in floating"
    ):
        merge_and_unload(model)
    unload(model)
    assert type(model.blocks[0].up) is nn.Linear


# ----------------------------------------------------------------- nothing to do is not done silently

CALLS = [fastspec.merge, fastspec.unmerge, fastspec.keep_merged, merge_and_unload, unload]


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
def test_a_model_that_was_never_adapted_is_refused(call):
    with pytest.raises(ValueError, match="the model has no adapter"):
        call(net())


@pytest.mark.parametrize("method", ["LoraConfig", "SpectralConfig"])
@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
def test_a_peft_model_is_pointed_to_its_own_methods(call, method):
    peft = pytest.importorskip("peft")
    import fastspec.peft

    config = {"LoraConfig": peft.LoraConfig, "SpectralConfig": fastspec.peft.SpectralConfig}[method]
    model = peft.get_peft_model(net(), config(r=2, target_modules=["up", "down"]))
    for target in (model, model.base_model.model):
        if hasattr(target, "peft_config"):
            with pytest.raises(ValueError, match="the adapters of this model are PEFT's"):
                call(target)


# -------------------------------------------------------------------------------- save_pretrained


@pytest.mark.parametrize("how", ["model", "layers", "inner", "compiled", "copied", "pickled"])
def test_save_pretrained_of_a_merged_model_writes_merged_weights(tmp_path, how):
    model = shifted(bert())
    y = logits(model)
    if how == "layers":
        for _, layer in fastspec.model.targets.spectral_layers(model):
            layer.merge()
    else:
        fastspec.merge(model)
    saved = model
    if how == "compiled":
        saved = torch.compile(model, backend="eager")
    elif how == "copied":
        saved = copy.deepcopy(model)
        fastspec.unmerge(model)
    elif how == "pickled":
        saved = pickle.loads(pickle.dumps(model))
        fastspec.unmerge(model)
    if how == "inner":
        model.bert.save_pretrained(tmp_path)
        again = type(model.bert).from_pretrained(tmp_path)
        assert_close(again(TOKENS)[0], model.bert(TOKENS)[0])
        return
    saved.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert described(again)[1] == described(bert())[1]
    assert_close(logits(again), y)


def test_unmerged_it_writes_what_it_did_and_says_so(tmp_path):
    model = shifted(bert())
    with pytest.warns(UserWarning, match="from_pretrained takes the base weights alone"):
        model.save_pretrained(tmp_path)
    again = shifted(bert(seed=1))
    fastspec.merge(again)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_close(logits(again), logits(model))


def test_partly_merged_models_are_refused(tmp_path):
    model = shifted(bert())
    model.bert.encoder.layer[0].output.dense.merge()
    with pytest.raises(ValueError, match="is not merged, other layers are"):
        model.save_pretrained(tmp_path)


def test_a_given_state_dict_is_written_merged(tmp_path):
    model = shifted(bert())
    y = logits(model)
    fastspec.merge(model)
    compiled = torch.compile(model, backend="eager")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    assert_close(logits(type(model).from_pretrained(tmp_path / "given")), y)
    with pytest.raises(ValueError, match=r"lacks .*\.delta"):
        model.save_pretrained(tmp_path / "other", state_dict=bert().state_dict())
    state = fastspec.model.merging._merged_state(model, compiled.state_dict())
    name = "_orig_mod.bert.encoder.layer.0.output.dense"
    assert torch.equal(state[f"{name}.weight"], model.bert.encoder.layer[0].output.dense.weight)
    assert f"{name}.delta" not in state


class OwnSave(nn.Module):
    """A model whose `save_pretrained` takes no state dict, as of other libraries."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 2))

    def save_pretrained(self, folder):
        if hasattr(self.inner, "save_pretrained"):
            self.inner.save_pretrained(folder)
        else:
            torch.save(self.state_dict(), folder / "model.pt")


def test_a_save_that_takes_no_state_dict_is_refused_while_merged(tmp_path):
    model = fastspec.merge(shifted(OwnSave()))
    with pytest.raises(ValueError, match="would write the base weights of a merged model"):
        model.save_pretrained(tmp_path)
    merge_and_unload(model).save_pretrained(tmp_path)
    assert "inner.0.delta" not in torch.load(tmp_path / "model.pt")


def test_unless_a_model_inside_writes_itself(tmp_path):
    inner = bert()
    model = shifted(OwnSave(inner), target_modules=["query", "value"])
    y = logits(inner)
    fastspec.merge(model).save_pretrained(tmp_path)
    assert_close(logits(type(inner).from_pretrained(tmp_path)), y)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_plain_trainers_checkpoint_of_a_merged_model(tmp_path, compiled):
    transformers = pytest.importorskip("transformers")
    model = shifted(bert(num_labels=3))
    y = logits(model)
    fastspec.merge(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True
    )
    given = torch.compile(model, backend="eager") if compiled else model
    trainer = transformers.Trainer(given, arguments)
    trainer.save_model(str(tmp_path / "saved"))
    # of a compiled model Trainer writes names that from_pretrained does not know, adapted or not
    state = load_file(tmp_path / "saved" / "model.safetensors")
    again = bert(num_labels=3)
    again.load_state_dict({name.removeprefix("_orig_mod."): t for name, t in state.items()})
    assert_close(logits(again), y)
    trainer._load_from_checkpoint(str(tmp_path / "saved"))  # as resuming does
    assert_close(logits(model), y)


def test_a_merged_and_unloaded_model_is_saved_as_any_other(tmp_path):
    model = shifted(bert())
    y = logits(model)
    merge_and_unload(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert_close(logits(again), y)
