"""What is trained, or moves, beside the coefficients: it is in the adapter, which loads into its own base."""

import copy
import io

import pytest
import torch
from support import assert_unchanged, frozen_state, rewrite, unpack
from tiny_models import IDS, Late, bert, gpt2, net, trained
from torch import nn

from fastspec import SpectralConfig, add_task, load_adapter, load_tasks, save_adapter, spectralize
from fastspec.files import ADAPTER_FILE as FILE
from fastspec.model.adapter_file import AdapterError

TOKENS = torch.arange(16).reshape(2, 8)


class Router(nn.Module):
    """A persistent buffer that its own forward moves, as the load balance of DeepSeek-V3's experts does."""

    def __init__(self, d):
        super().__init__()
        self.register_buffer("balance", torch.zeros(d))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(d), persistent=False)

    def forward(self, x):
        if self.training:
            self.balance += 0.1 * x.detach().mean(0)
            self.calls += 1
            self.cache.copy_(x.detach().mean(0))
        return x + self.balance


class Moving(nn.Module):
    def __init__(self, kind, d=16):
        super().__init__()
        self.body = nn.Linear(12, d)
        self.moving = {
            "batch norm": lambda: nn.BatchNorm1d(d),
            "batch norm, cumulative": lambda: nn.BatchNorm1d(d, momentum=None),
            "instance norm": lambda: nn.Sequential(
                nn.Unflatten(1, (4, -1)),
                nn.InstanceNorm1d(4, track_running_stats=True),
                nn.Flatten(),
            ),
            "a buffer of its own": lambda: Router(d),
        }[kind]()
        self.head = nn.Linear(d, 2)

    def forward(self, x):
        return self.head(self.moving(self.body(x)).relu())


KINDS = ("batch norm", "batch norm, cumulative", "instance norm", "a buffer of its own")
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def moving(kind):
    torch.manual_seed(0)
    return Moving(kind).eval()


def moved(model):
    g = torch.Generator().manual_seed(2)
    for _ in range(5):
        model.train()(3 * torch.randn(8, 12, generator=g) + 1)
    return model.eval()


@pytest.mark.parametrize("into", ["plain", "adapted"])
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_moved_are_in_the_adapter(tmp_path, kind, into):
    config = SpectralConfig(rank=2)
    model = moved(spectralize(moving(kind), config))
    save_adapter(model, tmp_path / "a")
    other = moving(kind)
    if into == "adapted":
        spectralize(other, config)
    assert torch.equal(load_adapter(other, tmp_path / "a")(X), model(X))
    assert not torch.equal(model(X), moving(kind)(X))
    save_adapter(other, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "a" / FILE).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_stayed_are_base(tmp_path, kind):
    save_adapter(spectralize(moving(kind), SpectralConfig(rank=2)), tmp_path)
    _, config = unpack((tmp_path / FILE).read_bytes())
    assert config["state"] == []
    with pytest.raises(AdapterError, match="other base weights: not the same are 'moving"):
        load_adapter(moved(moving(kind)), tmp_path)
    with pytest.raises(AdapterError, match="other base weights: not the same are 'moving"):
        load_adapter(moved(spectralize(moving(kind), SpectralConfig(rank=2))), tmp_path)


def test_what_no_state_dict_holds_is_no_state(tmp_path):
    save_adapter(
        moved(spectralize(moving("a buffer of its own"), SpectralConfig(rank=2))), tmp_path
    )
    _, config = unpack((tmp_path / FILE).read_bytes())
    assert config["state"] == ["moving.balance", "moving.calls"]


def test_running_statistics_are_none_of_many_tasks(tmp_path):
    save_adapter(moved(spectralize(moving("batch norm"), SpectralConfig(rank=2))), tmp_path / "a")
    model = moving("batch norm")
    before = frozen_state(model, X)
    for load in (
        lambda: load_tasks(model, [tmp_path / "a"]),
        lambda: add_task(model, "a", tmp_path / "a"),
    ):
        with pytest.raises(
            AdapterError, match=r"holds 'moving\.\w+', of which a model has one for all"
        ):
            load()
        assert_unchanged(model, before, X)


# ------------------------------------------------------------------------------- trained by hand


@pytest.mark.parametrize(
    "name", ["embed.weight", "blocks.0.up.bias", "blocks.1.norm.weight", "head.weight"]
)
def test_a_parameter_unfrozen_by_hand_is_in_the_adapter(tmp_path, name):
    config = SpectralConfig(rank=2, modules_to_save=[])
    model = spectralize(net(), config)
    parameter = model.get_parameter(name)
    parameter.requires_grad_(True)
    model(IDS).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    save_adapter(model, tmp_path)
    for other in (net(), spectralize(net(), config)):
        assert torch.equal(load_adapter(other, tmp_path)(IDS), model(IDS))
        assert {n for n, p in other.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
    assert name in unpack((tmp_path / FILE).read_bytes())[1]["state"]


def test_a_parameter_trained_and_frozen_again_is_another_base(tmp_path):
    model = trained()
    model.embed.weight.data += 1
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match=r"not the same are 'embed\.weight', 1 of 13"):
        load_adapter(net(), tmp_path)


def test_flags_of_an_adapted_model_stay(tmp_path):
    save_adapter(trained(), tmp_path)
    model = trained(seed=1).requires_grad_(False)
    load_adapter(model, tmp_path)
    assert not any(p.requires_grad for p in model.parameters())


# ----------------------------------------------------------------------------------------- tied


@pytest.mark.parametrize("saved", [["lm_head"], ["wte"], ["wte", "lm_head"]], ids=str)
@pytest.mark.parametrize("into", ["plain", "adapted"])
def test_tied_embeddings_saved_whole_load_into_their_base(tmp_path, saved, into):
    config = SpectralConfig(rank=2, modules_to_save=saved)
    model = spectralize(gpt2(), config)
    model(TOKENS).logits.square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert not torch.equal(model.lm_head.weight, gpt2().lm_head.weight)
    save_adapter(model, tmp_path)
    other = gpt2()
    if into == "adapted":
        spectralize(other, config)
    load_adapter(other, tmp_path)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def test_an_untied_base_is_not_that_base(tmp_path):
    save_adapter(spectralize(gpt2(), SpectralConfig(rank=2, modules_to_save=["lm_head"])), tmp_path)
    with pytest.raises(AdapterError, match=r"base had no frozen 'transformer\.wte\.weight': tied"):
        load_adapter(gpt2(tie_word_embeddings=False), tmp_path)


# ---------------------------------------------------------------------------------- from anybody


@pytest.mark.parametrize(
    "name",
    ["blocks.0.up.weight", "blocks.0.up.delta", "blocks.0.up.u", "nowhere", "__class__", "blocks"],
)
def test_a_folder_names_no_tensor_that_must_stay(tmp_path, name):
    save_adapter(trained(), tmp_path)
    value = torch.zeros(64, 16)
    rewrite(
        tmp_path, lambda t: t.update({name: value}), lambda config: config["state"].append(name)
    )
    for model in (net(), spectralize(net(), SpectralConfig(rank=4))):
        before = frozen_state(model, IDS)
        with pytest.raises(
            AdapterError, match=f"it holds '{name}', which this model does not have or"
        ):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before, IDS)


def test_state_of_another_shape_or_dtype_is_refused(tmp_path):
    model = moved(spectralize(moving("batch norm"), SpectralConfig(rank=2)))
    save_adapter(model, tmp_path)
    good = (tmp_path / FILE).read_bytes()
    for change, said in (
        (lambda t: t.update({"moving.running_mean": torch.zeros(3)}), r"is \[3\] in the adapter"),
        (lambda t: t.update({"moving.running_mean": torch.zeros(16).double()}), "float64"),
        (lambda t: t["moving.running_var"].fill_(float("nan")), "holds NaN"),
    ):
        (tmp_path / FILE).write_bytes(good)
        rewrite(tmp_path, change)
        plain = moving("batch norm")
        before = frozen_state(plain, X)
        with pytest.raises(AdapterError, match=said):
            load_adapter(plain, tmp_path)
        assert_unchanged(plain, before, X)


def test_a_copied_model_knows_its_buffers(tmp_path):
    model = copy.deepcopy(spectralize(moving("batch norm"), SpectralConfig(rank=2)))
    save_adapter(moved(model), tmp_path)
    assert torch.equal(load_adapter(moving("batch norm"), tmp_path)(X), model(X))


def test_a_head_of_two_layers_with_statistics(tmp_path):
    """What is saved whole brings its buffers as ever."""
    base = bert()
    base.classifier = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    plain = copy.deepcopy(base).eval()
    model = spectralize(base, SpectralConfig(rank=2)).train()
    model(TOKENS)
    save_adapter(model.eval(), tmp_path)
    assert unpack((tmp_path / FILE).read_bytes())[1]["state"] == []
    assert torch.equal(load_adapter(plain, tmp_path)(TOKENS).logits, model(TOKENS).logits)


# ---------------------------------------------------------------------------------- made late, or no tensor


class Extra(nn.Module):
    """Keeps a number that a state dict holds as its extra state, as modules in 8-bit floats do."""

    def __init__(self, kind=int) -> None:
        super().__init__()
        self.linear, self.kind, self.calls = nn.Linear(16, 16), kind, 0

    def get_extra_state(self):
        return torch.tensor(self.calls) if self.kind is torch.Tensor else {"calls": self.calls}

    def set_extra_state(self, state) -> None:
        self.calls = int(state["calls"] if isinstance(state, dict) else state)

    def forward(self, x):
        self.calls += self.training
        return self.linear(x) + self.calls


class Between(nn.Module):
    def __init__(self, make_middle) -> None:
        super().__init__()
        self.body, self.middle, self.head = nn.Linear(12, 16), make_middle(), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.middle(self.body(x)))


def between(make_middle):
    torch.manual_seed(0)
    return Between(make_middle).eval()


@pytest.mark.parametrize("into", ["plain", "adapted", "used"])
def test_a_buffer_that_is_made_late(tmp_path, into):
    model = moved(spectralize(between(Late), SpectralConfig(rank=2)))
    save_adapter(model, tmp_path)
    other = between(Late)
    if into != "plain":
        spectralize(other, SpectralConfig(rank=2))
    if into == "used":
        other.train()(X + 3)
        other.eval()
    load_adapter(other, tmp_path)
    assert torch.equal(other(X), model(X))
    save_adapter(other, tmp_path / "again")
    assert torch.equal(load_adapter(between(Late), tmp_path / "again")(X), model(X))


def test_a_folder_makes_no_buffer_that_the_model_never_has(tmp_path):
    save_adapter(moved(spectralize(between(Late), SpectralConfig(rank=2))), tmp_path)
    for middle in (nn.Identity, lambda: Router(16)):
        with pytest.raises(
            AdapterError, match=r"it holds 'middle\.scale', which this model does not"
        ):
            load_adapter(between(middle), tmp_path)


@pytest.mark.parametrize("kind", [dict, torch.Tensor])
@pytest.mark.parametrize("heads", [[], ["middle"]])
def test_extra_state_that_moved_is_not_lost(tmp_path, kind, heads):
    config = SpectralConfig(rank=2, modules_to_save=heads)
    model = spectralize(between(lambda: Extra(kind)), config)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(between(lambda: Extra(kind)), tmp_path)(X), model(X))
    before = (tmp_path / FILE).read_bytes()
    model.train()(X)
    with pytest.raises(
        ValueError, match=r"^middle\._extra_state has changed since the model was adap"
    ):
        save_adapter(model, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_extra_state_that_is_equal_has_not_moved(tmp_path):
    class Noted(Extra):
        def get_extra_state(self):
            note = "n" + str(0)
            return {"a": note, "b": [note, "n" + str(0)][self.calls], "c": io.BytesIO(b"x")}

    model = spectralize(between(Noted), SpectralConfig(rank=2))
    model.middle.calls = 1  # the same text in another object, which pickles otherwise
    save_adapter(model, tmp_path)


def test_extra_state_that_nothing_can_save_is_no_hindrance(tmp_path):
    class Hooked(Extra):
        def get_extra_state(self):
            return {"hook": lambda: 1}

    save_adapter(spectralize(between(Hooked), SpectralConfig(rank=2)), tmp_path)


# ---------------------------------------------------------------------------------- compiled in part


@pytest.fixture
def compiled_in_part():
    model = trained()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model.head = torch.compile(model.head, backend="eager")
    return model


def test_a_model_compiled_in_part_has_the_adapter_of_a_plain_one(tmp_path, compiled_in_part):
    save_adapter(trained(), tmp_path / "plain")
    save_adapter(compiled_in_part, tmp_path / "compiled", bases=True)
    stored, told = unpack((tmp_path / "compiled" / FILE).read_bytes())
    assert "_orig_mod" not in str([*stored, told])
    y = trained()(IDS)
    assert torch.equal(load_adapter(net(), tmp_path / "compiled")(IDS), y)
    for name in ("plain", "compiled"):
        other = spectralize(net(), SpectralConfig(rank=4))
        other.blocks[1] = torch.compile(other.blocks[1], backend="eager")
        other.head = torch.compile(other.head, backend="eager")
        assert torch.equal(load_adapter(other, tmp_path / name)(IDS), y)


def test_a_damaged_one_does_not_load_into_it(tmp_path, compiled_in_part):
    save_adapter(trained(), tmp_path)
    rewrite(tmp_path, lambda t: t.pop("head.bias"))
    with pytest.raises(AdapterError, match=r"the adapter lacks head\.bias"):
        load_adapter(compiled_in_part, tmp_path)


def test_a_wrapper_of_another_kind_names_its_part(tmp_path):
    class Lightning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = trained()

    with pytest.raises(ValueError, match=r"its part 'model' has: pass that \(model\.model\)"):
        save_adapter(Lightning(), tmp_path)
