"""In PEFT too, bases that come out otherwise where an adapter is loaded are no adapter's."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft_support import PREFIX, mlp_config, shift
from support import assert_unchanged, frozen_state
from tiny_models import mlp
from torch import nn

import fastspec.peft
from fastspec.model.adapter_file import AdapterError
from fastspec.svd.factors import Factors, factorize

X = torch.randn(8, 10, generator=torch.Generator().manual_seed(1))


def tied():
    model = mlp()
    nn.init.orthogonal_(model.lin0.weight)
    return model


@pytest.fixture
def elsewhere(monkeypatch):
    """Factors as another machine makes them: the same but for a rotation among tied singular values."""

    def rotated(weights, directions, names=None, progress=False):
        made = []
        for f in factorize(weights, directions, names, progress):
            q = torch.linalg.qr(torch.randn(len(f.s), len(f.s)))[0]
            alike = bool((f.s[0] - f.s[-1]).abs() < 1e-4 * f.s[0])
            made.append(Factors(f.u @ q, f.s, q.mT @ f.vh, f.singular) if alike else f)
        return made

    return lambda: monkeypatch.setattr("fastspec.peft.model.factorize", rotated)


@pytest.mark.parametrize("core", ["diag", "band", "dense"])
def test_another_basis_among_tied_values_is_refused(tmp_path, elsewhere, core):
    model = get_peft_model(tied(), mlp_config(core=core))
    shift(model)
    model.save_pretrained(tmp_path / "a")
    fastspec.peft.save_as_lora(tmp_path / "lora", model)
    y = model.eval()(X)
    torch.testing.assert_close(fastspec.peft.load_adapter(tied(), tmp_path / "a")(X), y)
    elsewhere()
    with pytest.raises(AdapterError, match=r"basis of 'lin0' here is another one.*save_as_lora"):
        PeftModel.from_pretrained(tied(), tmp_path / "a")
    base = tied()
    before = frozen_state(base, X)
    with pytest.raises(AdapterError, match="the basis of 'lin0' here is another one"):
        fastspec.peft.load_adapter(base, tmp_path / "a")
    assert_unchanged(base, before, X)
    assert base.lin0.weight.requires_grad
    # what is written with its vectors means the same
    torch.testing.assert_close(PeftModel.from_pretrained(tied(), tmp_path / "lora").eval()(X), y)
    # below another adapter
    other = get_peft_model(tied(), mlp_config(core=core, r=3)).eval()
    shift(other, 1)
    before = other(X)
    with pytest.raises(AdapterError, match="the basis of 'lin0' here is another one"):
        fastspec.peft.load_adapter(other, tmp_path / "a", "second")
    assert list(other.peft_config) == ["default"]
    assert torch.equal(other(X), before)


def test_a_state_dict_without_sketches_loads(tmp_path):
    """As one made by hand, or averaged."""
    model = get_peft_model(tied(), mlp_config())
    shift(model)
    state = get_peft_model_state_dict(model)
    assert f"{PREFIX}lin0.fastspec_sketch" in state
    plain = {name: 2 * t for name, t in state.items() if not name.endswith("sketch")}
    result = set_peft_model_state_dict(model, plain)
    assert not result.unexpected_keys
    assert not set_peft_model_state_dict(model, state).unexpected_keys
