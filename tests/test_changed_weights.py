"""The weight changes after its factors were made: they follow it, or the layer says what to do."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from support import assert_close
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastspec
import fastspec.nn.follow as follow
from fastspec import SpectralConfig, SpectralLinear, save_adapter, spectralize

X = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(16, 12, generator=torch.Generator().manual_seed(2))
PLANS = {  # ranks that take every kind of plan: the short side, and the complete basis
    "short": 4,
    "complete": 12,
}


@pytest.fixture(params=PLANS.values(), ids=PLANS)
def layer(request) -> SpectralLinear:
    torch.manual_seed(0)
    return SpectralLinear(12, 16, rank=request.param)


@pytest.fixture
def made(monkeypatch) -> list:
    """The factorisations that layers have made on their own."""
    calls: list = []
    plain = follow.factorize

    def counted(*args, **kwargs):
        calls.append(args)
        return plain(*args, **kwargs)

    monkeypatch.setattr(follow, "factorize", counted)
    return calls


def step(layer, x=X):
    """Output, gradient of the coefficients and of the input, of one training call."""
    x = x.clone().requires_grad_(True)
    layer.delta.grad = None
    y = layer(x)
    y.square().sum().backward()
    return y.detach(), layer.delta.grad.clone(), x.grad


def fresh(layer):
    """The layer as it should be: made anew from the weight as it is, with the same coefficients."""
    plain = nn.Linear(12, 16)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    wanted = SpectralLinear.from_linear(plain, rank=layer.rank)
    with torch.no_grad():
        wanted.delta.copy_(layer.delta)
    return wanted


def assert_follows(layer):
    for got, exact in zip(step(layer), step(fresh(layer)), strict=True):
        assert_close(got, exact)


def copied(layer):
    with torch.no_grad():
        layer.weight.copy_(OTHER)


def initialised(layer):
    nn.init.xavier_uniform_(layer.weight)


def replaced(layer):
    layer.weight = nn.Parameter(OTHER.clone(), requires_grad=False)


def replaced_and_written(layer):
    # an alias of the former storage, with as many writes to its name as the former tensor
    with torch.no_grad():
        layer.weight.mul_(1)
    layer(X)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    copied(layer)


def data_replaced(layer):
    layer.weight.data = OTHER.clone()


def data_emptied_and_replaced(layer):
    layer.weight.data = torch.empty(0)
    layer.weight.data = OTHER.clone()


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def pruned_for_good(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    layer(X)
    prune.remove(layer, "weight")
    layer.weight.requires_grad_(False)


def loaded(layer):
    layer.load_state_dict({"weight": OTHER.clone()}, strict=False)


def given_out(layer):
    # as torch.distributed.checkpoint does: it reads into what a state dict holds
    layer.state_dict()["weight"].copy_(OTHER)


CHANGES = [
    copied,
    initialised,
    replaced,
    replaced_and_written,
    data_replaced,
    data_emptied_and_replaced,
    pruned,
    pruned_for_good,
    loaded,
    given_out,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_the_factors_follow_the_weight(layer, change):
    change(layer)
    assert_follows(layer)
    with torch.no_grad():
        assert_close(layer(X), fresh(layer)(X))


@pytest.mark.parametrize("change", CHANGES[:-1], ids=lambda f: f.__name__)
def test_coefficients_that_are_not_zero_are_spoken_of(layer, change):
    with torch.no_grad():
        layer.delta.fill_(0.1)
    if change is loaded:
        loaded(layer)  # a plain state resets them
        assert not layer.delta.any()
        return
    with pytest.warns(UserWarning, match="has changed since its factors were made"):
        changed_and_called(layer, change)
    assert_follows(layer)


def changed_and_called(layer, change):
    change(layer)
    layer(X)


@pytest.mark.parametrize("zero", [True, False], ids=["unshifted", "shifted"])
def test_a_kept_copy_follows_too(layer, zero):
    layer.keep_merged()
    with torch.no_grad():
        layer.delta.fill_(0.0 if zero else 0.1)
        layer(X)
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(OTHER)
        layer.delta.zero_()
        assert_close(layer(X), fresh(layer)(X))
        layer.delta.fill_(0.1)
        assert_close(layer(X), fresh(layer)(X))


def test_a_merge_is_of_the_weight_as_it_is(layer):
    copied(layer)
    with torch.no_grad():
        layer.delta.fill_(0.1)
    with pytest.warns(UserWarning, match="has changed"):
        layer.merge()
    layer.unmerge()
    assert_close(layer.effective_weight(), fresh(layer).effective_weight())


def test_a_base_weight_changed_while_merged(layer):
    layer.merge()
    with torch.no_grad():
        layer.base_weight.copy_(OTHER)
    layer.unmerge()
    assert_follows(layer)


@pytest.mark.parametrize("use", ["unmerge", "state_dict"])
def test_a_merged_weight_changed_in_place_is_not_lost_silently(layer, use):
    layer.merge()
    with torch.no_grad():
        layer.weight.mul_(0.5)
    with pytest.raises(ValueError, match="changed in place while it was merged"):
        getattr(layer, use)()
    layer.load_state_dict({"weight": OTHER, "bias": layer.bias.clone()})  # which replaces it
    assert not layer.merged
    assert_follows(layer)


def test_a_merged_layer_moves_copies_and_pickles(layer):
    layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double().float()):
        other.state_dict()
        other.unmerge()
        assert_follows(other)


def test_conv1d_and_single_layers_of_a_model(made):
    transformers = pytest.importorskip("transformers.pytorch_utils")
    conv = fastspec.SpectralConv1D.from_conv1d(transformers.Conv1D(16, 12), rank=12)
    made.clear()
    nn.init.normal_(conv.weight)
    wanted = fastspec.SpectralConv1D.from_conv1d(copy_of(conv), rank=12)
    for got, exact in zip(step(conv), step(wanted), strict=True):
        assert_close(got, exact)
    assert len(made) == 2


def copy_of(conv):
    from transformers.pytorch_utils import Conv1D

    plain = Conv1D(conv.nf, conv.nx)
    with torch.no_grad():
        plain.weight.copy_(conv.weight)
        plain.bias.copy_(conv.bias)
    return plain


def test_a_weight_that_parted_from_its_twin_leaves_the_twins_factors():
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    net[1].weight = net[0].weight
    spectralize(net, SpectralConfig(rank=12))
    before = step(net[0])
    net[1].weight = nn.Parameter(torch.randn(12, 12), requires_grad=False)
    net[1](X)
    for got, exact in zip(step(net[0]), before, strict=True):
        assert torch.equal(got, exact)


def test_mixed_tasks_follow():
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))
    spectralize(net, SpectralConfig(rank=12))
    fastspec.add_task(net, "one")
    with torch.no_grad():
        net[0].weight.copy_(OTHER)
    net(X, tasks=["one"] * len(X))
    basis = fresh(net[0])
    assert torch.equal(net[0].u, basis.u)


# --------------------------------------------------------- what changes nothing makes no factors again


def same_values_again(layer):
    with torch.no_grad():
        layer.weight.copy_(layer.weight.clone())


def same_state(layer):
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))


def same_state_assigned(layer):
    layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)


def changed_and_put_back(layer):
    was = layer.weight.clone()
    copied(layer)
    with torch.no_grad():
        layer.weight.copy_(was)


def changed_and_loaded_back(layer):
    state = copy.deepcopy(layer.state_dict())
    copied(layer)
    layer.load_state_dict(state)


def averaged(layer):
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(layer)
    average.update_parameters(layer)
    average.module(X)


@pytest.mark.parametrize(
    "what",
    [
        same_values_again,
        same_state,
        same_state_assigned,
        changed_and_put_back,
        changed_and_loaded_back,
        averaged,
        lambda layer: copy.deepcopy(layer)(X),
        lambda layer: pickle.loads(pickle.dumps(layer))(X),
        lambda layer: layer.to("cpu").share_memory(),
        lambda layer: layer.double().float(),
        lambda layer: layer.train().eval(),
    ],
)
def test_the_same_values_keep_their_factors(layer, made, what):
    made.clear()
    what(layer)
    step(layer)
    layer.merge()
    layer.unmerge()
    step(layer)
    assert not made


def test_safetensors_of_the_same_values(layer, made, tmp_path):
    made.clear()
    save_model(layer, str(tmp_path / "layer.safetensors"))
    load_model(layer, str(tmp_path / "layer.safetensors"))
    step(layer)
    assert not made


def test_nothing_is_compared_from_step_to_step(layer, monkeypatch):
    def forbidden(weight):
        raise AssertionError("contents were compared")

    layer(X)
    monkeypatch.setattr("fastspec.nn.made_from.tensor_fingerprint", forbidden)
    optimizer = torch.optim.AdamW([layer.delta], lr=1e-2)
    for _ in range(3):
        step(layer)
        optimizer.step()
        layer.eval()(X)
        layer.train()
        layer.to("cpu")


def test_a_trained_weight_keeps_its_basis(layer, made):
    """The plain formula runs, with the basis the coefficients have; nothing is factorised step by step."""
    made.clear()
    layer.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([layer.weight, layer.delta], lr=1e-2)
    for _ in range(3):
        step(layer)
        optimizer.step()
    assert not made
    x, delta = X.double(), layer.delta.detach().double()
    w = layer.weight.detach().double() + layer.u.double() @ delta.diag() @ layer.vh.double()
    with torch.no_grad():
        assert_close(layer(X), (x @ w.mT + layer.bias.double()).float())


# ----------------------------------------------------------------------------------- copies and moves


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_changed_layer_notices(layer, copying):
    copied(layer)
    assert_follows(copying(layer))


def test_a_changed_layer_that_is_cast_notices(layer):
    copied(layer)
    layer.double()
    assert torch.equal(layer.u, fresh(layer.float()).u)


def test_a_layer_without_values_gets_its_factors_with_them(made):
    with torch.device("meta"):
        layer = SpectralLinear(12, 16, rank=12)
    made.clear()
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(OTHER)
        layer.bias.zero_()
        layer.delta.zero_()
    assert_follows(layer)


def test_an_emptied_layer_gets_them_again(layer, made):
    state = copy.deepcopy(layer.state_dict())
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    assert_follows(layer)


def test_inside_inference_mode_factors_are_made_for_training_too(layer):
    with torch.inference_mode():
        layer.weight.copy_(OTHER)
        layer(X)
    assert_follows(layer)


def test_under_autocast_factors_are_made_in_full_precision(layer):
    copied(layer)
    with torch.autocast("cpu", torch.bfloat16):
        layer(X)
    assert_follows(layer)


def test_after_a_change_compiled_code_and_eager_code_agree():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16))
    spectralize(net, SpectralConfig(rank=12))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    compiled(X)
    net.load_state_dict({"0.weight": OTHER, "0.bias": torch.zeros(16)})
    compiled(X).square().sum().backward()
    got = net[0].delta.grad.clone()
    assert_close(got, step(net[0])[1])


# ---------------------------------------------------------------------------------- saving an adapter


def test_an_adapter_of_another_basis_than_its_weights_is_not_saved(tmp_path):
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))
    spectralize(net, SpectralConfig(rank=4))
    net(X).sum().backward()
    net[0].weight.data.copy_(OTHER)  # past the count of writes
    with pytest.raises(ValueError, match=r"0\.weight has changed since its factors were made"):
        save_adapter(net, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    net[0].refactorize()
    save_adapter(net, tmp_path / "adapter")


def test_an_adapter_loaded_into_changed_weights_gets_their_factors(tmp_path):
    def plain():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))

    def other():
        net = plain()
        net[0].weight.data.copy_(OTHER)
        return net

    net = spectralize(other(), SpectralConfig(rank=4))
    with torch.no_grad():
        net[0].delta.fill_(0.3)
    save_adapter(net, tmp_path / "adapter")
    changed = spectralize(plain(), SpectralConfig(rank=4))
    changed[0].weight.data.copy_(OTHER)
    fastspec.load_adapter(changed, tmp_path / "adapter")
    assert torch.equal(changed(X), net(X))


def test_an_adapter_of_a_model_cast_afterwards_is_spoken_of(tmp_path):
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))
    spectralize(net, SpectralConfig(rank=4))
    net.double()
    with pytest.warns(UserWarning, match=r"cast after its factors were made \(0 and 1 more"):
        save_adapter(net, tmp_path / "adapter")
    before = net[0].u.clone()
    with pytest.warns(UserWarning, match=r"cast after its factors were made \(0 and 1 more"):
        fastspec.load_adapter(net, tmp_path / "adapter")
    assert torch.equal(net[0].u, before)  # as a run that resumes had them
    net.float()  # nothing was lost
    save_adapter(net, tmp_path / "adapter")
