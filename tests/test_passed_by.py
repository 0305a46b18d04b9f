"""Parents that read a layer's weight and never call the layer: named once, and never merged."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from support import assert_close
from torch import nn

import fastspec
from fastspec import SpectralConfig, merge, merge_and_unload, spectralize

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Reads the weight of `q`, calls `v`; `gate` is read in training and called otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.gate = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        gate = F.linear(x, self.gate.weight, self.gate.bias) if self.training else self.gate(x)
        return F.linear(x, self.q.weight, self.q.bias) * self.v(x) + gate


class Experts(nn.Module):
    """Only the first runs: what the others would do is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(12, 12)) for _ in range(3)])
        self.plain = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])

    def forward(self, x):
        return self.plain[0](self.experts[0](x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), Experts()

    def forward(self, x):
        return self.mlp(self.attention(x))


def plain() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def adapted(shift: float = 0.5) -> Model:
    model = spectralize(plain(), SpectralConfig(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("delta"):
                parameter.fill_(shift)
    return model


def call(model, train=False):
    model.train(train)
    return model(X).detach()


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


@pytest.fixture
def model():
    return adapted()


def test_a_layer_that_is_read_and_not_called_is_named(model):
    with pytest.warns(UserWarning, match=r"^attention\.q: adapted, but not called in inference"):
        call(model)
    with pytest.warns(UserWarning, match=r"^attention\.q, attention\.gate: .* not called in train"):
        call(model, train=True)


def test_once(model):
    with pytest.warns(UserWarning, match=r"attention\.q"):
        call(model)
    quietly(call, model)
    with pytest.warns(UserWarning, match=r"attention\.gate"):
        call(model, train=True)
    quietly(call, model, True)
    quietly(call, model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_never_acted_is_not_merged(model):
    with pytest.warns(UserWarning, match=r"attention\.q"):
        y = call(model)
    with pytest.warns(UserWarning, match=r"attention\.q: .* any call so far \(so they stay unm"):
        merge(model)
    assert not model.attention.q.merged
    assert model.attention.gate.merged
    assert_close(call(model), y)


def test_nor_is_it_by_unloading(model):
    with pytest.warns(UserWarning, match=r"attention\.q"):
        y = call(model)
    with pytest.warns(UserWarning, match=r"attention\.q"):
        merge_and_unload(model)
    assert torch.equal(model.attention.q.weight, plain().attention.q.weight)
    assert_close(call(model), y)
    assert not model._forward_hooks
    assert not hasattr(model.attention.q, "acted")


def test_a_layer_that_acts_in_one_mode_is_merged(model):
    with pytest.warns(UserWarning, match=r"attention\.gate"):
        call(model, train=True)
    assert model.attention.gate.acted is False
    with pytest.warns(UserWarning, match=r"attention\.q"):
        call(model)
    assert model.attention.gate.acted is True


def test_layers_whose_parent_did_not_run_are_not_judged(model):
    with pytest.warns(UserWarning, match=r"attention\.q"):
        call(model)
    assert [e[0].acted for e in model.mlp.experts] == [True, None, None]
    assert [layer.acted for layer in model.mlp.plain] == [True, None]


def test_a_model_that_was_never_called_is_merged_whole(model):
    quietly(merge, model)
    assert model.attention.q.merged


def test_a_failed_call_says_nothing(model):
    with pytest.raises(ValueError, match="x must be"):
        model(X[:, :3])
    assert model.attention.v.acted is None
    with pytest.warns(UserWarning, match=r"^attention\.q: adapted"):
        call(model)
    assert not any(m._forward_pre_hooks for m in model.mlp.modules())


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_look_for_themselves(model, copying):
    other = copying(model)
    for each in (other, model):
        with pytest.warns(UserWarning, match=r"attention\.q"):
            call(each)
    assert other.attention.v.acted is True


def test_compiled_calls_are_not_looked_at(model):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    quietly(compiled, X)
    quietly(merge, model)


def test_save_pretrained_of_a_merged_model_with_such_a_layer(tmp_path):
    class Saved(Model):
        def save_pretrained(self, folder, state_dict=None):
            torch.save(state_dict or self.state_dict(), folder / "state.pt")

    model = spectralize(Saved(), SpectralConfig(rank=4))
    with torch.no_grad():
        model.attention.v.delta.fill_(1.0)
        model.attention.q.delta.fill_(1.0)
    with pytest.warns(UserWarning, match=r"attention\.q"):
        y = call(model)
    with pytest.warns(UserWarning, match=r"attention\.q"):
        merge(model)
    model.save_pretrained(tmp_path)
    again = Model()
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_close(call(again), y)


# ------------------------------------------------------------------------- models that are known for it

SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 32}


def mamba():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(**SMALL, state_size=4, time_step_rank=4)
    return transformers.MambaForCausalLM(config), torch.arange(6)[None]


def wavlm():
    transformers = pytest.importorskip("transformers")
    config = transformers.WavLMConfig(
        **SMALL,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    return transformers.WavLMModel(config), torch.randn(1, 800)


@pytest.mark.parametrize(
    ("make", "named"),
    [(mamba, r"mixer\.dt_proj: adapted"), (wavlm, r"attention\.k_proj, .*q_proj.*: adapted")],
)
def test_models_of_transformers(make, named):
    torch.manual_seed(0)
    model, x = make()
    spectralize(model.eval(), SpectralConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("delta"):
                parameter.fill_(0.1)
        with pytest.warns(UserWarning, match=named):
            y = model(x)[0]
        with pytest.warns(UserWarning, match="stay unmerged"):
            merge_and_unload(model)
        assert_close(model(x)[0], y)


def test_ordinary_models_pass():
    from tiny_models import bert, gpt2, llama, t5

    ids = torch.arange(1, 7)[None]
    for make in (bert, gpt2, llama):
        model = spectralize(make(), SpectralConfig(rank=2))
        quietly(model, ids)
        assert all(m.acted for _, m in fastspec.model.targets.spectral_layers(model))
    model = spectralize(t5(), SpectralConfig(rank=2))
    quietly(lambda: model(ids, decoder_input_ids=ids))
    quietly(lambda: model.generate(ids, max_new_tokens=3))


# ------------------------------------------------------------------------------------------------ PEFT


def through_peft():
    peft = pytest.importorskip("peft")
    import fastspec.peft

    config = fastspec.peft.SpectralConfig(r=4, target_modules=["q", "v", "gate"])
    model = peft.get_peft_model(plain(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fastspec_delta" in name:
                parameter.fill_(0.5)
    return model


def test_the_bridge_names_them_too():
    model = through_peft()
    with pytest.warns(UserWarning, match=r"^attention\.q: adapted, but not called in inference"):
        y = call(model)
    quietly(call, model)
    with pytest.warns(UserWarning, match=r"attention\.q: .*stay unmerged"):
        model.merge_adapter()
    assert_close(call(model), y)
    with pytest.warns(UserWarning, match=r"attention\.q: .*stay unmerged"):
        base = model.merge_and_unload()
    assert_close(call(base), y)


def test_unloading_takes_the_hooks_off():
    base = through_peft().unload()
    quietly(call, base)
    assert not base._forward_hooks
    assert not base._forward_pre_hooks


class Reads(nn.Module):
    """What reads weights from further up, through a container, or beside a call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleDict({"q": nn.Linear(12, 12), "v": nn.Linear(12, 12)})
        self.listed = nn.ModuleList([nn.Linear(12, 12)])
        self.holder = nn.Module()
        self.holder.k = nn.Linear(12, 12)
        self.embed = nn.Embedding(7, 12)
        self.tied = nn.Linear(12, 7, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, x):
        x = self.blocks["v"](x)
        if self.how == "dict":
            x = F.linear(x, self.blocks["q"].weight)
        elif self.how == "list":
            x = x @ self.listed[0].weight.T
        elif self.how == "holder":
            x = torch.cat([x, x @ self.holder.k.weight.detach()])
        elif self.how == "besides":
            x = x + F.linear(x, self.blocks["v"].weight)
        elif self.how == "metadata":
            weight = self.blocks["v"].weight
            x = x.to(weight.dtype).to(weight.device).reshape(-1, weight.shape[1])
        elif self.how == "tied":
            x = self.tied(x + self.embed(torch.arange(5)))
        return x


def reading(how):
    torch.manual_seed(0)
    config = SpectralConfig(
        rank=4, modules_to_save=[], exclude_modules=[] if how == "tied" else ["tied"]
    )
    model = spectralize(Reads(how).eval(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("delta"):
                parameter.fill_(0.5)
    return model


@pytest.mark.parametrize(
    ("how", "name"), [("dict", "blocks.q"), ("list", "listed.0"), ("holder", "holder.k")]
)
def test_weights_read_from_further_up(how, name):
    model = reading(how)
    with pytest.warns(UserWarning, match=rf"{name}: adapted, but not called in inference"):
        y = model(X)
    with pytest.warns(UserWarning, match=rf"{name}.*stay unmerged"):
        merge(model)
    assert_close(model(X), y)


def test_a_weight_that_is_read_beside_a_call_is_not_merged():
    model = reading("besides")
    with pytest.warns(UserWarning, match=r"blocks\.v: something else reads the weight"):
        y = model(X)
    for call in (merge, merge_and_unload):
        with pytest.raises(ValueError, match=r"blocks\.v can't be merged: something else reads"):
            call(model)
    assert_close(quietly(model, X), y)


@pytest.mark.parametrize("how", ["metadata", "tied"])
def test_reads_that_merging_does_not_touch(how):
    model = reading(how)
    y = quietly(model, X)
    assert_close(merge(model)(X), y)


def test_a_failed_call_leaves_nothing_on():
    model = reading("besides")
    with pytest.raises(ValueError, match="x must be"):
        model(X[:, :5])
    assert not torch.overrides._get_current_function_mode_stack()
    with pytest.warns(UserWarning, match="something else reads"):
        model(X)
    assert not torch.overrides._get_current_function_mode_stack()


def test_the_bridge_refuses_to_merge_what_is_read_besides():
    peft = pytest.importorskip("peft")
    import fastspec.peft

    torch.manual_seed(0)
    config = fastspec.peft.SpectralConfig(r=4, target_modules=["v"])
    model = peft.get_peft_model(Reads("besides").eval(), config)
    with pytest.warns(UserWarning, match=r"blocks\.v: something else reads the weight"):
        y = model(X)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"blocks\.v can't be merged"):
            call()
    assert_close(model(X), y)


def test_copies_that_are_made_before_a_call_are_nobodys_read():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).bfloat16()
    spectralize(model, SpectralConfig(rank=4))
    fastspec.keep_merged(model)
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    quietly(model.train(), x)  # the layers have copies from here on
    with torch.no_grad():
        quietly(model.eval(), x)
    assert [model[0].read, model[2].read] == [False, False]
    quietly(merge, model)
