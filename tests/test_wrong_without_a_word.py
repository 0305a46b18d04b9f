"""What used to adapt nothing, or the wrong thing, without a word: each is right now, or refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import fastspec
from fastspec import SpectralConfig, spectralize
from fastspec.model.targets import unwrap


class Net(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))
        self.gate = nn.Linear(width, 1)
        self.classifier = nn.Linear(width, 2)

    def forward(self, x):
        h = self.encoder(x)
        return self.classifier(h * self.gate(h).sigmoid())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------- a forward replaced on the instance


def test_a_forward_replaced_on_the_instance_is_refused(net):
    layer = net.encoder[0]
    plain = layer.forward
    layer.forward = lambda x: plain(x)
    with pytest.raises(TypeError, match=r"encoder\.0: its forward was replaced on the instance"):
        spectralize(net, SpectralConfig(rank=2))
    assert type(net.encoder[2]) is nn.Linear  # unchanged
    del layer.forward
    spectralize(net, SpectralConfig(rank=2))


def test_a_hook_of_accelerate_moves_to_the_adapted_layer(net):
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    hooks.add_hook_to_module(net.encoder[0], Doubled())
    before = net(X)
    spectralize(net, SpectralConfig(rank=4))
    assert torch.equal(net(X), before)
    net(X).square().sum().backward()
    assert net.encoder[0].delta.grad.abs().sum() > 0
    hooks.remove_hook_from_module(net.encoder[0])
    assert not torch.equal(net(X), before)


# ------------------------------------------------------------------------ names that match nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude_modules": ["pooller"]}, "exclude_modules names 'pooller'"),
        ({"exclude_modules": ["encoder"]}, r"inside it are encoder\.0, encoder\.2"),
        ({"target_modules": ["encoder.0", "encoder.1"]}, "target_modules names 'encoder.1'"),
        ({"rank": {"encoder": 2, "decoder": 4, "default": 1}}, "rank has the pattern 'decoder'"),
    ],
    ids=["misspelt exclusion", "a container", "no linear layer", "rank pattern"],
)
def test_a_name_that_means_nothing_here_is_refused(net, options, message):
    with pytest.raises(ValueError, match=message):
        spectralize(net, SpectralConfig(**{"rank": 2, **options}))
    assert fastspec.trainable_parameters(net)["adapter"] > 300  # nothing was frozen


def test_stacks_of_experts_are_spoken_of():
    net = Net()
    net.experts = nn.Parameter(torch.randn(4, 8, 12))
    with pytest.warns(UserWarning, match=r"stacks of matrices, such as \.?experts"):
        spectralize(net, SpectralConfig(rank=1))


# ------------------------------------------------------------------------------- tiny and odd layers


def test_a_default_rank_ends_at_a_tiny_matrix_short_side(net):
    spectralize(net, SpectralConfig(rank=4))
    assert net.gate.rank == 1
    assert net.encoder[0].rank == 4


def test_a_rank_asked_of_one_layer_is_not_lowered(net):
    with pytest.raises(ValueError, match=r"gate: rank 4 is above min\(in, out\) = 1"):
        spectralize(net, SpectralConfig(rank=4, target_modules=["encoder.0", "gate"]))


class PlainSubclass(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class LowRank(nn.Linear):
    """Computes the plain layer at the start, but holds more than it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.a, self.b = (
            nn.Parameter(torch.randn(2, sizes[0])),
            nn.Parameter(torch.zeros(sizes[1], 2)),
        )

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


def test_a_subclass_that_computes_the_plain_layer_is_adapted(net):
    net.encoder[0] = PlainSubclass(12, 16)
    before = net(X)
    spectralize(net, SpectralConfig(rank=2))
    torch.testing.assert_close(net(X), before)
    assert net.encoder[0].delta.requires_grad


@pytest.mark.parametrize("kind", [Scaled, LowRank])
def test_a_subclass_that_computes_more_is_refused(net, kind):
    net.encoder[0] = kind(12, 16)
    with pytest.raises(TypeError, match=r"encoder\.0: .* forward of its own"):
        spectralize(net, SpectralConfig(rank=2))


@pytest.mark.parametrize("what", ["weight_norm", "sparse", "lazy"])
def test_weights_that_are_no_plain_matrix_are_refused_and_nothing_is_frozen(net, what):
    if what == "weight_norm":
        parametrizations.weight_norm(net.encoder[2])
    elif what == "sparse":
        net.encoder[2].weight = nn.Parameter(net.encoder[2].weight.detach().to_sparse())
    else:
        net.encoder[2] = nn.LazyLinear(12)
    with pytest.raises((TypeError, ValueError), match=r"encoder\.2: "):
        spectralize(net, SpectralConfig(rank=2))
    assert type(net.encoder[0]) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("bridge", [False, True], ids=["core", "bridge"])
@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "orthogonal"])
def test_a_refused_parametrisation_keeps_its_own_state(net, kind, bridge):
    """That of spectral_norm moves whenever the weight is looked at in train mode."""
    getattr(parametrizations, kind)(net.encoder[2])
    net.train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(TypeError, match=r"encoder\.2: the weight is made anew"):
        adapt(net, bridge, rank=2)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def adapt(net, bridge, rank, **options):
    """By `spectralize`, or by PEFT's bridge."""
    if not bridge:
        return spectralize(net, SpectralConfig(rank=rank, **options))
    peft = pytest.importorskip("peft")
    import fastspec.peft

    return peft.get_peft_model(net, fastspec.peft.SpectralConfig(r=rank, **options))


@pytest.mark.parametrize("bridge", [False, True], ids=["core", "bridge"])
@pytest.mark.parametrize("kind", [Scaled, LowRank])
def test_the_bridge_compares_what_a_subclass_computes(net, bridge, kind):
    net.encoder[0] = PlainSubclass(12, 16)
    before = net(X)
    torch.testing.assert_close(adapt(copy.deepcopy(net), bridge, rank=2)(X), before)
    net.encoder[0] = kind(12, 16)
    with pytest.raises(TypeError, match=r"encoder\.0: .* forward of its own"):
        adapt(net, bridge, rank=2)


def test_the_bridge_lowers_a_rank_for_tiny_matrices_alone(net, tmp_path):
    peft = pytest.importorskip("peft")
    import fastspec.peft

    for targets in ("all-linear", r"encoder\.[02]|gate"):
        model = adapt(copy.deepcopy(net), True, rank=4, target_modules=targets)
        assert model.base_model.model.gate.fastspec_delta["default"].shape == (1,)
        assert model.base_model.model.encoder[0].fastspec_delta["default"].shape == (4,)
    model.save_pretrained(tmp_path)
    for load in (peft.PeftModel.from_pretrained, fastspec.peft.load_adapter):
        assert load(copy.deepcopy(net), tmp_path).base_model.model.gate.fastspec_delta
    with pytest.raises(ValueError, match=r"gate: rank 4 .* min\(in, out\) = 1"):
        adapt(copy.deepcopy(net), True, rank=4, target_modules=["encoder.0", "encoder.2", "gate"])
    with pytest.raises(ValueError, match=r"gate: rank 5 .* min\(in, out\) = 1"):
        adapt(copy.deepcopy(net), True, rank=4, rank_pattern={"gate": 5})
    before = repr(net)
    with pytest.raises(ValueError, match="rank 40 "):
        adapt(net, True, rank=40)
    assert repr(net) == before
    assert all(p.requires_grad for p in net.parameters())


# ------------------------------------------------------------------------------------------ wrappers


def wrapped(kind: str, net: nn.Module) -> nn.Module:
    makers = {
        "compiled": lambda m: torch.compile(m, backend="eager"),
        "averaged": AveragedModel,
        "parallel": nn.DataParallel,
    }
    return makers[kind](net)


@pytest.mark.parametrize("kind", ["compiled", "averaged", "parallel"])
def test_an_adapter_saved_through_a_wrapper_loads_without_it(net, kind, tmp_path):
    plain = copy.deepcopy(net)
    spectralize(net, SpectralConfig(rank=2))
    wrapper = wrapped(kind, net)
    inner = unwrap(wrapper)
    with torch.no_grad():
        inner.encoder[0].delta.fill_(0.5)
        inner.classifier.bias.fill_(1.0)
    counted = fastspec.trainable_parameters(wrapper)
    assert counted == fastspec.trainable_parameters(net)
    rates = {g["name"]: g["lr"] for g in fastspec.parameter_groups(wrapper, 1e-2, head_lr=1e-3)}
    assert rates == {"coefficients": 1e-2, "head": 1e-3}
    fastspec.save_adapter(wrapper, tmp_path)
    fastspec.load_adapter(plain, tmp_path)
    assert torch.equal(plain(X), inner(X))
    again = wrapped(kind, copy.deepcopy(net))
    assert fastspec.load_adapter(again, tmp_path) is again
    fastspec.add_task(again, "one", tmp_path)
    assert fastspec.list_tasks(again) == fastspec.list_tasks(unwrap(again)) == ["one"]


def test_a_compiled_model_is_adapted_inside(net):
    compiled = torch.compile(net, backend="eager")
    assert spectralize(compiled, SpectralConfig(rank=2)) is compiled
    compiled(X).sum().backward()
    assert net.encoder[0].delta.grad is not None


# ------------------------------------------------------------------ what is trained and not stored


def test_saving_refuses_a_trained_weight_below_its_own_basis(net, tmp_path):
    spectralize(net, SpectralConfig(rank=2))
    net.encoder[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"encoder\.0\.weight is trainable, and the layer's basis"):
        fastspec.save_adapter(net, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
