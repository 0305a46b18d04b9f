"""Weights that PyTorch swaps for others (`swap_tensors`), and tasks over weights that changed."""

import pytest
import torch
from tasks_support import IDS, with_tasks
from tiny_models import mlp, trained

import fastspec
from fastspec import SpectralConfig

X = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def bridged(config):
    peft = pytest.importorskip("peft")
    import fastspec.peft

    config = fastspec.peft.SpectralConfig(
        r=4, target_modules=["lin0", "lin1"], modules_to_save=["head"]
    )
    return peft.get_peft_model(mlp(), config).eval()


def native(config):
    return fastspec.spectralize(mlp(), config).eval()


@pytest.fixture(params=[native, bridged], ids=["native", "peft"])
def model(request):
    model = request.param(SpectralConfig(rank=4))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "delta" in name:
                p.copy_(torch.randn(p.shape, generator=g))
    return model


@pytest.mark.usefixtures("swapping")
class TestSwapped:
    @torch.no_grad()  # a graph would hold the weights, which are then not swapped
    def test_a_cast(self, model):
        want = model(X)
        y = model.to(torch.float64)(X.double())
        assert torch.allclose(y, want.double(), atol=1e-5)
        assert torch.equal(model.to(torch.float32)(X), want)

    @torch.no_grad()
    def test_a_loaded_state_dict(self, model):
        want, state = model(X), {n: t.clone() for n, t in model.state_dict().items()}
        for name, p in model.named_parameters():
            if "delta" in name:
                p.zero_()
        assert not torch.equal(model(X), want)
        model.load_state_dict(state)
        assert torch.equal(model(X), want)


@pytest.mark.usefixtures("swapping")
@torch.no_grad()
def test_a_cast_of_a_merged_model():
    model = trained()
    ids = IDS[:2]
    want = fastspec.merge(model)(ids)
    model.to(torch.float64)
    assert torch.allclose(model(ids), want.double(), atol=1e-4)
    fastspec.unmerge(model)


@pytest.mark.usefixtures("swapping")
def test_a_write_to_a_merged_weight_is_never_swapped_away():
    model = fastspec.merge(trained())
    with torch.no_grad():
        model.blocks[0].up.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"swap SpectralLinear\.weight"):
        model.to(torch.float64)
    with pytest.raises(ValueError, match="changed in place while it was merged"):
        fastspec.unmerge(model)


def test_tasks_over_a_changed_weight_are_spoken_of():
    model = with_tasks()
    fastspec.set_task(model, None)
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(torch.linspace(1, 2, 16))
    with pytest.warns(UserWarning, match="act in another basis"):
        model(IDS, tasks=["a"] * len(IDS))
