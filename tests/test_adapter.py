"""Adapter folders: the round trip, and everything that must be refused."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from support import minilm, rewrite
from tiny_models import IDS, net, trained

import fastspec
from fastspec import SpectralConfig, load_adapter, save_adapter, spectralize
from fastspec.model.adapter import AdapterError
from fastspec.model.targets import spectral_layers


@pytest.fixture
def saved(tmp_path):
    return save_adapter(trained(), tmp_path / "a")


CONFIGS = [
    {"rank": 4},
    {"rank": {"up": 2, "default": 0.5}, "core": "dense"},
    {"rank": "full", "core": "band", "half_width": 2},
    {"select": (3, 7), "basis": "random", "seed": 3},
    {"rank": 2, "train_bias": True, "train_layernorm": True},
    {"rank": 2, "modules_to_save": ["head", "blocks.0.norm"]},
    {"rank": 2, "target_modules": ["up"], "modules_to_save": []},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_round_trip_into_a_plain_and_an_adapted_model(tmp_path, options):
    model = trained(SpectralConfig(**options))
    y = model(IDS)
    save_adapter(model, tmp_path)
    loaded = load_adapter(net(), tmp_path)
    assert torch.equal(loaded(IDS), y)
    assert loaded.spectral.modules_to_save == model.spectral.modules_to_save
    again = save_adapter(loaded, tmp_path / "again")
    for name in ("adapter.safetensors", "adapter_config.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
    adapted = spectralize(net(), SpectralConfig(**options))
    delta = next(iter(spectral_layers(adapted)))[1].delta
    assert torch.equal(load_adapter(adapted, tmp_path)(IDS), y)
    assert next(iter(spectral_layers(adapted)))[1].delta is delta, "values are copied in place"


def test_saving_a_merged_model_saves_the_same_adapter(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "a")
    fastspec.merge(model)
    save_adapter(model, tmp_path / "b")
    for name in ("adapter.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def refused(model, folder, message, error=AdapterError):
    before = copy.deepcopy(model.state_dict())
    text = repr(model)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert repr(model) == text
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_other_base_weights_are_refused(saved):
    refused(net(seed=1), saved, "other base weights")
    refused(spectralize(net(seed=1), SpectralConfig(rank=4)), saved, "other base weights")
    changed = net()
    changed.embed.weight.data[0, 0] += 1e-3  # not an adapted weight, but base all the same
    refused(changed, saved, "other base weights")
    bfloat16 = net().to(torch.bfloat16)
    refused(bfloat16, saved, r"head\.weight is torch\.float32.*expects torch\.bfloat16")
    bfloat16.head.float()
    refused(bfloat16, saved, "other base weights")


def test_another_rank_or_core_is_refused(saved):
    refused(
        spectralize(net(), SpectralConfig(rank=5)),
        saved,
        "rank 4 in the adapter and 5 in the model",
    )
    refused(
        spectralize(net(), SpectralConfig(rank=4, core="dense")),
        saved,
        "core: the adapter has 'diag'",
    )
    refused(spectralize(net(), SpectralConfig(rank=4, select="trailing")), saved, "select")
    refused(spectralize(net(), SpectralConfig(rank=4, target_modules=["up"])), saved, "and None in")


def test_another_head_is_refused(saved):
    model = net()
    model.head = torch.nn.Linear(16, 7)
    refused(model, saved, r"head\.weight is \[3, 16\].*expects \[7, 16\]")


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_truncated_tensors_are_refused(saved, keep):
    path = saved / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(net(), saved, "truncated, damaged")


def test_every_flipped_byte_is_noticed(saved):
    path = saved / "adapter.safetensors"
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(AdapterError):
            load_adapter(net(), saved)


def test_tensors_of_another_save_are_refused(saved, tmp_path):
    other = save_adapter(trained(seed=1), tmp_path / "b")
    (saved / "adapter.safetensors").write_bytes((other / "adapter.safetensors").read_bytes())
    refused(net(), saved, "another save")


def test_values_that_are_not_finite_are_refused(saved):
    rewrite(saved, lambda t: t["blocks.0.up.delta"].fill_(float("nan")))
    refused(net(), saved, r"blocks\.0\.up\.delta holds NaN")


def test_missing_tensors_are_refused(saved):
    rewrite(saved, lambda t: t.pop("blocks.0.up.delta"))
    refused(net(), saved, r"lacks blocks\.0\.up\.delta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("spectral"), "'spectral' is missing"),
        (lambda m: m["layers"].update({"blocks.0.up": -1}), "ranks of at least 1"),
        (lambda m: m["layers"].update({"blocks.0.up": 17}), r"up: rank 17 is above min\(in, out\)"),
        (lambda m: m["layers"].update({"blocks.7.up": 4}), r"'blocks\.7\.up', which this model"),
        (lambda m: m["layers"].clear(), "'layers' must map"),
        (lambda m: m["spectral"].update(core="full"), "core must be one of"),
        (lambda m: m["spectral"].update(colour=1), "colour"),
        (lambda m: m.update(format=99), "format 99"),
        (lambda m: m.update(modules_to_save="head"), "modules_to_save"),
    ],
)
def test_a_damaged_config_is_refused(saved, change, message):
    path = saved / "adapter_config.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    refused(net(), saved, message)


def test_text_that_is_no_json_is_refused(saved):
    (saved / "adapter_config.json").write_text("{")
    refused(net(), saved, "not a usable adapter config")


def test_missing_files(tmp_path, saved):
    refused(net(), tmp_path / "nowhere", "no such file", FileNotFoundError)
    (saved / "adapter.safetensors").unlink()
    refused(net(), saved, "adapter.safetensors: no such file", FileNotFoundError)


def test_saving_refuses_what_is_not_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="spectralize"):
        save_adapter(net(), tmp_path / "a")
    model = trained()
    model.head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"head\.bias holds NaN"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_failed_write_leaves_the_former_file(saved, monkeypatch):
    before = (saved / "adapter.safetensors").read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(seed=1), saved)
    monkeypatch.undo()
    assert (saved / "adapter.safetensors").read_bytes() == before
    assert sorted(p.name for p in saved.iterdir()) == ["adapter.safetensors", "adapter_config.json"]


def test_minilm_in_a_fresh_process(tmp_path):
    """File size, and logits in a process that has only the base model and the folder."""
    model = minilm()
    head = copy.deepcopy(model.classifier.state_dict())
    spectralize(model, SpectralConfig(rank=32, modules_to_save=[]))
    g = torch.Generator().manual_seed(0)
    for _, layer in spectral_layers(model):
        layer.delta.data.copy_(0.3 * torch.randn(layer.delta.shape, generator=g))
    save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a" / "adapter.safetensors").stat().st_size < 20_000
    ids = torch.arange(40).reshape(2, 20) + 1000
    torch.save({"logits": model(ids).logits.detach(), "head": head, "ids": ids}, tmp_path / "t.pt")
    script = (
        "import sys, torch, fastspec; sys.path.insert(0, sys.argv[2]); from support import minilm\n"
        "t = torch.load(sys.argv[1] + '/t.pt'); m = minilm(); m.classifier.load_state_dict(t['head'])\n"
        "fastspec.load_adapter(m, sys.argv[1] + '/a')\n"
        "print((m(t['ids']).logits - t['logits']).abs().max().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(__import__("pathlib").Path(__file__).parent)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(run.stdout.split()[-1]) < 1e-5
