"""Hooks of a plain layer go along when it is adapted or put back, and their handles still remove them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastspec import SpectralConfig, spectralize

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
KINDS = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward with keywords": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "forward, always": lambda m, f: m.register_forward_hook(f, always_call=True, prepend=True),
    "before forward": lambda m, f: m.register_forward_pre_hook(f),
    "before forward with keywords": lambda m, f: m.register_forward_pre_hook(f, with_kwargs=True),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "before backward": lambda m, f: m.register_full_backward_pre_hook(f),
    "state dict": lambda m, f: m.register_state_dict_post_hook(f),
    "before state dict": lambda m, f: m.register_state_dict_pre_hook(f),
    "load": lambda m, f: m.register_load_state_dict_post_hook(f),
    "before load": lambda m, f: m.register_load_state_dict_pre_hook(f),
    "before load, privately": lambda m, f: m._register_load_state_dict_pre_hook(f),
}


def use(net: nn.Module) -> None:
    """All that any of these hooks is called for."""
    net(X).sum().backward()
    net.load_state_dict(net.state_dict())


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_handle_from_before_removes_its_hook(kind):
    net, calls = plain(), []
    handle = kind(net[0], lambda *args: calls.append(args))
    spectralize(net, SpectralConfig(rank=4))
    use(net)
    assert len(calls) == 1
    modules = [a for a in calls[0] if isinstance(a, nn.Module)]
    assert all(module is net[0] for module in modules)
    handle.remove()
    use(net)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_several_and_later_ones_keep_apart(kind):
    net, calls = plain(), []
    handles = [kind(net[0], lambda *_, i=i: calls.append(i)) for i in range(2)]
    spectralize(net, SpectralConfig(rank=4))
    handles.append(kind(net[0], lambda *_: calls.append(2)))
    for i in (1, 2, 0):
        handles[i].remove()
        calls.clear()
        use(net)
        assert sorted(calls) == [j for j in range(3) if handles[j].id in alive(handles, net[0])]
    assert not calls


def alive(handles, layer):
    return {id for name, hooks in vars(layer).items() if name.endswith("_hooks") for id in hooks}


def test_a_block_with_a_hook_in_it():
    net, calls = plain(), []
    with net[0].register_forward_hook(lambda *_: calls.append(1)):
        spectralize(net, SpectralConfig(rank=4))
        net(X)
    net(X)
    assert calls == [1]


def noted(module, args, output):
    module.calls = getattr(module, "calls", 0) + 1


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_hooks_of_its_own(copying):
    net = plain()
    handle = net[0].register_forward_hook(noted)
    spectralize(net, SpectralConfig(rank=4))
    other = copying(net)
    handle.remove()
    other(X)
    net(X)
    assert other[0].calls == 1
    assert not hasattr(net[0], "calls")


@pytest.mark.parametrize("kind", ["before backward", "backward", "forward", "before forward"])
def test_the_bridge_refuses_hooks_that_it_would_not_run(kind):
    peft = pytest.importorskip("peft")
    import fastspec.peft

    net = plain()
    handle = KINDS[kind](net[0], lambda *_: None)
    config = fastspec.peft.SpectralConfig(r=4, target_modules=["0", "2"])
    with pytest.raises(ValueError, match="0: the layer has forward hooks or a forward of its own"):
        peft.get_peft_model(net, config)
    handle.remove()
    peft.get_peft_model(net, config)
