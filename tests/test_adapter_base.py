"""What an adapter needs of its base: the same tensors, compared one by one and named where they differ."""

import json

import pytest
import torch
from support import unpack
from tiny_models import IDS, bert, gpt2, net, trained
from torch import nn

import fastspec
from fastspec import SpectralConfig, load_adapter, save_adapter, spectralize
from fastspec.files import ADAPTER_FILE as FILE
from fastspec.model.adapter_file import AdapterError
from fastspec.model.targets import spectral_layers

TOKENS = torch.arange(16).reshape(2, 8)


def shifted(model, config):
    spectralize(model, config)
    for _, layer in spectral_layers(model):
        layer.delta.data.fill_(0.3)
    return model.eval()


def redrawn(module):
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


def logits(model):
    return model(TOKENS).logits


# ------------------------------------------------------------------------- the tensor that differs


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("embed.weight", r"not the same are 'embed\.weight', 1 of 13"),
        ("blocks.1.norm.bias", r"not the same are 'blocks\.1\.norm\.bias', 1 of 13"),
        ("blocks.0.up.weight", r"not the same are 'blocks\.0\.up\.weight', 1 of 13"),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_one_other_tensor_is_named(tmp_path, name, said, adapted):
    save_adapter(trained(), tmp_path)
    model = net()
    model.get_parameter(name).data.view(-1)[0] += 1e-3
    if adapted:
        spectralize(model, SpectralConfig(rank=4))
    with pytest.raises(AdapterError, match=f"other base weights: {said}"):
        load_adapter(model, tmp_path)


def test_another_model_is_told_by_how_much_differs(tmp_path):
    save_adapter(trained(), tmp_path)
    other = net(seed=1)  # norms are ones and zeros in any seed
    with pytest.raises(AdapterError, match="9 of 13; coefficients only mean something in the bas"):
        load_adapter(other, tmp_path)


def test_a_tensor_of_only_one_of_both_is_named(tmp_path):
    model = net()
    model.extra = nn.Linear(4, 4)
    save_adapter(spectralize(model, SpectralConfig(rank=2, target_modules=["up"])), tmp_path)
    with pytest.raises(AdapterError, match=r"this model has no frozen 'extra\.bias'"):
        load_adapter(net(), tmp_path)
    save_adapter(trained(), tmp_path)
    model = net()
    model.extra = nn.Linear(4, 4)
    with pytest.raises(AdapterError, match=r"the adapter's base had no frozen 'extra\.bias'"):
        load_adapter(model, tmp_path)


def test_the_file_has_one_digest_a_tensor(tmp_path):
    save_adapter(trained(), tmp_path)
    _, config = unpack((tmp_path / FILE).read_bytes())
    names = {n for n, _ in net().named_parameters() if not n.startswith("head.")}
    assert config["base"].keys() == names
    assert {len(digest) for digest in config["base"].values()} == {16}
    assert config["rows"] == {"embed.weight": 11}
    assert len(json.dumps(config["base"])) < 1000


# ------------------------------------------------------------------------------------------- heads


def test_a_new_random_head_is_no_base(tmp_path):
    """It is in the adapter, or the caller left it out and is told that it is another."""
    model = shifted(bert(), SpectralConfig(rank=4))
    save_adapter(model, tmp_path / "whole")
    fresh = bert()
    redrawn(fresh.classifier)
    assert torch.equal(logits(load_adapter(fresh, tmp_path / "whole")), logits(model))

    model = shifted(bert(), SpectralConfig(rank=4, modules_to_save=[]))
    save_adapter(model, tmp_path / "body")
    fresh = bert()
    redrawn(fresh.classifier)
    with pytest.warns(UserWarning, match=r"trained beside another 'classifier\.(weight|bias)'"):
        load_adapter(fresh, tmp_path / "body")
    fresh.classifier.load_state_dict(model.classifier.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def test_a_random_pooler_is_refused_by_name_and_loads_from_the_adapter(tmp_path):
    save_adapter(shifted(bert(), SpectralConfig(rank=4)), tmp_path / "a")
    fresh = bert()
    redrawn(fresh.bert.pooler)
    with pytest.raises(
        AdapterError, match=r"bert\.pooler\.dense\.weight.*name it in modules_to_save"
    ):
        load_adapter(fresh, tmp_path / "a")
    config = SpectralConfig(rank=4, modules_to_save=["classifier", "pooler.dense"])
    model = shifted(bert(), config)
    save_adapter(model, tmp_path / "b")
    assert torch.equal(logits(load_adapter(fresh, tmp_path / "b")), logits(model))


# -------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("make", [bert, gpt2])
def test_an_embedding_may_have_more_rows(tmp_path, make):
    """Also where it is tied to the output layer, whose further columns are new as well."""
    model = shifted(make(), SpectralConfig(rank=4))
    save_adapter(model, tmp_path)
    fresh = make()
    fresh.resize_token_embeddings(60)
    width = logits(model).shape[-1]
    torch.testing.assert_close(logits(load_adapter(fresh, tmp_path))[..., :width], logits(model))


def test_an_embedding_with_fewer_or_other_rows_is_refused(tmp_path):
    model = bert()
    model.resize_token_embeddings(60)
    save_adapter(shifted(model, SpectralConfig(rank=4)), tmp_path)
    with pytest.raises(AdapterError, match=r"had 60 rows and has 50: model\.resize_token"):
        load_adapter(bert(), tmp_path)
    save_adapter(shifted(bert(), SpectralConfig(rank=4)), tmp_path)
    other = bert()
    other.resize_token_embeddings(60)
    other.get_input_embeddings().weight.data[49] += 1
    with pytest.raises(AdapterError, match=r"not the same are 'bert\.embeddings\.word_embeddings"):
        load_adapter(other, tmp_path)


def test_rows_are_for_embeddings_alone(tmp_path):
    """A folder can't make one row of any tensor stand for all of it."""
    from support import rewrite

    save_adapter(trained(), tmp_path)
    first = net().blocks[0].up.weight[:1]
    digest = fastspec.fingerprint.tensor_fingerprint(first)[:16]

    def change(config):
        config["rows"]["blocks.0.up.weight"] = 1
        config["base"]["blocks.0.up.weight"] = digest

    rewrite(tmp_path, change_config=change)
    with pytest.raises(AdapterError, match=r"not the same are 'blocks\.0\.up\.weight'"):
        load_adapter(net(), tmp_path)


# ----------------------------------------------------------------------------------- strict or not


def test_what_is_not_adapted_may_differ_on_request(tmp_path):
    model = trained()
    model.blocks[1].down.delta.data.zero_()
    save_adapter(model, tmp_path)
    other = net()
    other.embed.weight.data[0] += 1
    other.blocks[1].down.weight.data[0] += 1  # which its coefficients, zero, leave as it is
    with pytest.raises(AdapterError, match=r"'embed\.weight', 'blocks\.1\.down\.weight', 2 of 13"):
        load_adapter(other, tmp_path)
    with pytest.warns(UserWarning, match=r"trained beside another 'embed\.weight', 'blocks"):
        load_adapter(other, tmp_path, strict=False)
    assert not torch.equal(other(IDS), net()(IDS))
    again = net()
    again.blocks[0].down.weight.data[0] += 1
    with pytest.raises(AdapterError, match=r"not the same are 'blocks\.0\.down\.weight'"):
        load_adapter(again, tmp_path, strict=False)
