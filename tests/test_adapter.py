"""Adapter folders: the round trip, and everything that must be refused."""

import copy
import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from support import minilm, rewrite, unpack
from tiny_models import IDS, bert, net, trained

import fastspec
from fastspec import SpectralConfig, load_adapter, save_adapter, spectralize
from fastspec.files import ADAPTER_FILE as FILE
from fastspec.files import weight_files
from fastspec.model.adapter_file import AdapterError
from fastspec.model.targets import spectral_layers


@pytest.fixture
def saved(tmp_path):
    return save_adapter(trained(), tmp_path / "a")


CONFIGS = [
    {"rank": 4},
    {"rank": {"up": 2, "default": 0.5}, "core": "dense"},
    {"rank": "full", "core": "band", "half_width": 2},
    {"rank": 4, "core": "low_rank", "core_rank": 3},
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
    assert (again / FILE).read_bytes() == (tmp_path / FILE).read_bytes()
    adapted = spectralize(net(), SpectralConfig(**options))
    delta = next(iter(spectral_layers(adapted)))[1].delta
    assert torch.equal(load_adapter(adapted, tmp_path)(IDS), y)
    assert next(iter(spectral_layers(adapted)))[1].delta is delta, "values are copied in place"


def test_saving_a_merged_model_saves_the_same_adapter(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "a")
    fastspec.merge(model)
    save_adapter(model, tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


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
    path = saved / FILE
    path.write_bytes(path.read_bytes()[:keep])
    refused(net(), saved, "truncated, damaged")


def test_every_flipped_byte_is_noticed(saved):
    path = saved / FILE
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(AdapterError):
            load_adapter(net(), saved)


def test_a_config_of_another_save_is_refused(saved, tmp_path):
    """Also one changed bit of a seed, which would mean other random bases."""
    config = SpectralConfig(rank=4, basis="random", seed=0)
    save_adapter(trained(config), saved)
    data = (saved / FILE).read_bytes()
    (saved / FILE).write_bytes(data.replace(rb"\"seed\": 0", rb"\"seed\": 1"))
    refused(net(), saved, "the digest differs")


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
    rewrite(saved, change_config=change)
    refused(net(), saved, message)


def test_tensors_alone_are_refused(saved):
    content, _ = unpack((saved / FILE).read_bytes())
    (saved / FILE).write_bytes(content)
    refused(net(), saved, "its header holds no config of format 3; it is damaged, or of an earlier")


def test_missing_files(tmp_path, saved):
    refused(net(), tmp_path / "nowhere", "no such file", FileNotFoundError)
    (saved / FILE).unlink()
    refused(net(), saved, "adapter.safetensors: no such file", FileNotFoundError)


def test_saving_refuses_what_is_not_an_adapter(tmp_path):
    with pytest.raises(ValueError, match="spectralize"):
        save_adapter(net(), tmp_path / "a")
    model = trained()
    model.head.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"head\.bias holds NaN"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class TestInterrupted:
    """A save over a former adapter that ends too early, at any of its calls to the system."""

    CALLS = ("tempfile.mkstemp", "os.fdopen", "os.fsync", "os.chmod", "os.replace")

    def loads(self, folder):
        assert torch.equal(load_adapter(net(), folder)(IDS), trained()(IDS))

    @pytest.mark.parametrize("call", CALLS)
    def test_a_failure(self, saved, monkeypatch, call):
        def fail(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(call, fail)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(trained(seed=1), saved)
        monkeypatch.undo()
        self.loads(saved)
        assert [p.name for p in saved.iterdir()] == [FILE]

    @pytest.mark.parametrize("size", [0, 1, 700, 1300])
    def test_a_full_disk(self, saved, size):
        """Of a file that may have `size` bytes, as where that many are left."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save_adapter(trained(seed=1), saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, former)
        self.loads(saved)
        assert [p.name for p in saved.iterdir()] == [FILE]

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
    def test_a_kill(self, saved, monkeypatch, call, before):
        owner, name = {"os": os, "tempfile": tempfile}[call.split(".")[0]], call.split(".")[1]
        real = getattr(owner, name)

        def killed(*args, **kwargs):
            if not before:
                real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        other = trained(seed=1)
        child = os.fork()
        if child == 0:
            setattr(owner, name, killed)
            torch.set_num_threads(1)  # the others stayed in the parent
            save_adapter(other, saved)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        if call == "os.replace" and not before:
            assert torch.equal(load_adapter(net(), saved)(IDS), other(IDS))
        else:
            self.loads(saved)


class TestBesideOtherFiles:
    """An adapter in a folder where other libraries look for files of theirs."""

    def test_the_base_model_loads_from_its_folder(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        base = bert(num_labels=3)
        base.save_pretrained(tmp_path)
        kind = transformers.BertForSequenceClassification
        model = spectralize(kind.from_pretrained(tmp_path), SpectralConfig(rank=4))
        next(iter(spectral_layers(model)))[1].delta.data.fill_(0.5)
        save_adapter(model, tmp_path)
        ids = torch.arange(16).reshape(2, 8)
        for load in (kind, transformers.AutoModelForSequenceClassification):
            plain = load.from_pretrained(tmp_path)
            assert torch.equal(plain.eval()(ids).logits, base.eval()(ids).logits)
            assert torch.equal(load_adapter(plain, tmp_path)(ids).logits, model.eval()(ids).logits)

    def test_the_weights_of_that_folder_are_the_models_own(self, tmp_path):
        base = bert(num_labels=3)
        base.save_pretrained(tmp_path)
        (own,) = weight_files(tmp_path)
        save_adapter(spectralize(base, SpectralConfig(rank=4)), tmp_path)
        assert weight_files(tmp_path) == [own]

    def test_a_folder_of_peft_is_named_so(self, tmp_path):
        peft = pytest.importorskip("peft")
        lora = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["up"]))
        lora.save_pretrained(tmp_path)
        refused(net(), tmp_path, "a folder of PEFT .*PeftModel.from_pretrained")
        save_adapter(trained(), tmp_path)
        assert torch.equal(load_adapter(net(), tmp_path)(IDS), trained()(IDS))


def test_minilm_in_a_fresh_process(tmp_path):
    """File size, and logits in a process that has only the base model and the folder."""
    model = minilm()
    head = copy.deepcopy(model.classifier.state_dict())
    spectralize(model, SpectralConfig(rank=32, modules_to_save=[]))
    g = torch.Generator().manual_seed(0)
    for _, layer in spectral_layers(model):
        layer.delta.data.copy_(0.3 * torch.randn(layer.delta.shape, generator=g))
    save_adapter(model, tmp_path / "a")
    assert (tmp_path / "a" / FILE).stat().st_size < 20_000
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
