"""PEFT folders from anybody through `fastspec.peft.load_adapter`: one clear error, the model unchanged."""

import json
import struct
import time

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_support import CASES, CORES, PREFIX, adapted, layers, output, shift
from safetensors.torch import load, save
from support import assert_close, little_memory
from tiny_models import bert, mlp

from fastspec.model.adapter import AdapterError
from fastspec.peft import SpectralConfig, load_adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class TestSound:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("core", CORES, ids=lambda o: o["core"])
    def test_it_is_what_peft_loads(self, tmp_path, case, core):
        model = adapted(case, **core)
        model.save_pretrained(tmp_path)
        loaded = load_adapter(CASES[case][0](), tmp_path, "task")
        theirs = PeftModel.from_pretrained(CASES[case][0](), tmp_path)
        assert type(loaded) is type(theirs)
        assert loaded.active_adapters == ["task"]
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(output(loaded), output(theirs))
        again = load_adapter(CASES[case][0](), tmp_path, "task", is_trainable=True)
        trained = {
            n.replace(".task", ".default") for n, p in again.named_parameters() if p.requires_grad
        }
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad}

    def test_a_second_adapter_shares_the_basis(self, tmp_path):
        model = adapted("bert", rank_pattern={"query": 2})
        model.save_pretrained(tmp_path)
        other = adapted("bert", 5)
        load_adapter(other, tmp_path, "second")
        assert other.active_adapters == ["default"]
        assert all(m.fastspec_basis["second"] is m.fastspec_basis["default"] for m in layers(other))
        other.set_adapter("second")
        assert torch.equal(output(other), output(model))
        other.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "second" / TENSORS).read_bytes() == (
            tmp_path / TENSORS
        ).read_bytes()
        by_peft = PeftModel.from_pretrained(bert(), tmp_path / "again" / "second")
        assert torch.equal(output(by_peft), output(model))

    def test_several_ranks_and_a_pattern_of_the_users_own(self, tmp_path):
        model = get_peft_model(
            mlp(), SpectralConfig(r=3, target_modules=r"lin\d", rank_pattern={r"lin1": 2})
        )
        shift(model)
        model.save_pretrained(tmp_path)
        loaded = load_adapter(mlp(), tmp_path)
        assert torch.equal(output(loaded), output(model))
        assert loaded.peft_config["default"].rank_pattern == {"lin0": 3, "lin1": 2}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(tensor file, config) of a sound adapter of the Mlp."""
    folder = tmp_path_factory.mktemp("sound")
    adapted("mlp").save_pretrained(folder)
    return (folder / TENSORS).read_bytes(), json.loads((folder / CONFIG).read_text())


def write(folder, tensors, config):
    if tensors is not None:
        (folder / TENSORS).write_bytes(tensors)
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))


def changed(tensors, change):
    loaded = load(tensors)
    change(loaded)
    return save(loaded)


def state(model):
    return (
        [(n, m, sorted(vars(m))) for n, m in model.named_modules()],
        {n: (p, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()},
        dict(getattr(model, "peft_config", {})),
        model.training,
        output(model).detach(),
    )


def refused(folder, match, error=AdapterError):
    """By the plain base model and as a second adapter, both unchanged."""
    for model in (mlp(), adapted("mlp")):
        modules, parameters, configs, training, y = state(model)
        began = time.process_time()
        with little_memory(), pytest.raises(error, match=match):
            load_adapter(model, folder, "other")
        assert time.process_time() - began < 5
        after = state(model)
        assert after[0] == modules
        assert after[1].keys() == parameters.keys()
        for name, (p, flag, value) in parameters.items():
            assert after[1][name][0] is p
            assert after[1][name][1] == flag
            assert torch.equal(after[1][name][2], value)
        assert after[2] == configs
        assert after[3] == training
        assert torch.equal(after[4], y)


LIN0, LIN1, HEAD = (
    f"{PREFIX}lin0.fastspec_delta",
    f"{PREFIX}lin1.fastspec_delta",
    f"{PREFIX}head.bias",
)
TENSOR_FILES = {
    "NaN": (lambda t: t[LIN0][1].fill_(float("nan")), "NaN or infinity"),
    "infinity in a head": (lambda t: t[HEAD].fill_(float("inf")), "NaN or infinity"),
    "no coefficients of a layer": (
        lambda t: t.pop(LIN0),
        "holds 'base_model.model.lin0.fastspec_sk",
    ),
    "nothing of a layer": (
        lambda t: [t.pop(LIN0), t.pop(LIN0.replace("delta", "sketch"))],
        "lacks tensors of some of its layers",
    ),
    "another sketch": (
        lambda t: t[LIN0.replace("delta", "sketch")].neg_(),
        "basis of 'lin0' here is",
    ),
    "no head": (lambda t: t.pop(HEAD), r"lacks base_model\.model\.head\.bias"),
    "double precision": (lambda t: t.update({LIN0: t[LIN0].double()}), "float64.*float32"),
    "half precision": (lambda t: t.update({HEAD: t[HEAD].half()}), "float16.*float32"),
    "another core": (lambda t: t.update({LIN0: torch.zeros(4, 4)}), r"\[4, 4\].*expects \[4\]"),
    "a number": (lambda t: t.update({LIN0: torch.tensor(1.0)}), "is empty"),
    "nothing": (lambda t: t.update({LIN0: torch.zeros(0)}), "is empty"),
    "a wider head": (lambda t: t.update({HEAD: torch.zeros(9)}), r"\[9\].*expects \[2\]"),
    "too many directions": (lambda t: t.update({LIN0: torch.zeros(11)}), "lin0.*11"),
    "a base weight": (
        lambda t: t.update({f"{PREFIX}lin0.base_layer.weight": torch.zeros(20, 10)}),
        r"it holds another weight of 'lin0' than this model has",
    ),
    "a layer that is not there": (
        lambda t: t.update({f"{PREFIX}../x.fastspec_delta": torch.zeros(4)}),
        r"'\.\./x', which is no linear layer",
    ),
    "another prefix": (
        lambda t: t.update({"x.lin0.fastspec_delta": t.pop(LIN0)}),
        "no linear layer",
    ),
    "a part of a head": (
        lambda t: t.update({f"{PREFIX}head.fastspec_delta": torch.zeros(2)}),
        "saves 'head' whole and a part",
    ),
}


@pytest.mark.parametrize(("change", "match"), TENSOR_FILES.values(), ids=TENSOR_FILES)
def test_tensors(tmp_path, sound, change, match):
    write(tmp_path, changed(sound[0], change), sound[1])
    refused(tmp_path, match)


BOMB = "(.*)*(.*)*(.*)*(.*)*(.*)*x"  # takes years
CONFIGS = {
    "another method": ({"peft_type": "LORA"}, "not 'FASTSPEC'"),
    "other base weights": ({"base_fingerprint": {"lin0": "0" * 16}}, "other base weights"),
    "one digest for all": ({"base_fingerprint": "0" * 64}, "must map layers to digests"),
    "digests that are none": ({"base_fingerprint": {"lin0": 3}}, "must map layers to digests"),
    "no base weights": ({"base_fingerprint": None}, "no base_fingerprint"),
    "biases": ({"bias": "all"}, "trains biases"),
    "a wider select": ({"select": [0, 5]}, "rank 4 by its tensor and 5 by the config"),
    "a kind of core": ({"core": "x"}, "core must be"),
    "half width 10^30": ({"core": "band", "half_width": 10**30}, "expects"),
    "a seed beyond 64 bits": ({"seed": 2**200}, "seed"),
    "a task": ({"task_type": "x"}, "Invalid task type"),
    "a pattern for a head": ({"modules_to_save": [BOMB]}, "must list module names"),
    "a head that is not there": ({"modules_to_save": ["head", "nowhere"]}, "saves 'nowhere'"),
    "an inner part as a head": ({"modules_to_save": ["fastspec_delta"]}, "saves 'fastspec_delta'"),
    "the whole model as a head": ({"modules_to_save": [""]}, "must list module names"),
    "a layer as a head": ({"modules_to_save": ["head", "lin0"]}, "saves 'lin0' whole"),
    "one name for all": ({"modules_to_save": "head"}, "must list module names"),
    "a list for a name": ({"base_model_name_or_path": ["x"]}, "not a str"),
}


@pytest.mark.parametrize(("change", "match"), CONFIGS.values(), ids=CONFIGS)
def test_configs(tmp_path, sound, change, match):
    write(tmp_path, sound[0], sound[1] | change)
    refused(tmp_path, match)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_tasks_whose_class_needs_another_model(tmp_path, sound, task):
    write(tmp_path, sound[0], sound[1] | {"task_type": task})
    model = mlp()
    before = state(model)
    with pytest.raises(AdapterError, match=f"does not do the task {task}"):
        load_adapter(model, tmp_path)
    assert state(model)[0] == before[0]


def test_patterns_are_never_run(tmp_path, sound):
    """PEFT and SpectralConfig match these against the names of modules; here the tensors name the layers."""
    bombs = {"target_modules": BOMB, "exclude_modules": BOMB, "rank_pattern": {BOMB: 4}}
    write(
        tmp_path, sound[0], sound[1] | bombs | {"layers_pattern": BOMB, "auto_mapping": {"x": "y"}}
    )
    began = time.process_time()
    loaded = load_adapter(mlp(), tmp_path)
    assert time.process_time() - began < 5
    assert_close(output(loaded), output(adapted("mlp")))
    assert loaded.peft_config["default"].target_modules == "lin0|lin1"


@pytest.mark.parametrize(
    "text", ["[]", "{", "null", '{"a":' * 100_000, '{"peft_type": "FASTSPEC"}']
)
def test_configs_that_are_none(tmp_path, sound, text):
    write(tmp_path, sound[0], text)
    refused(
        tmp_path,
        r"not a usable adapter config|holds 'base_model\.model\.head\.bias', which|no base_fingerprint",
    )


def test_every_truncation_and_flipped_bit(tmp_path, sound):
    """A flipped bit of a value may be another adapter; anything else is refused, the model unchanged."""
    tensors, config = sound
    for keep in range(0, len(tensors), 97):
        write(tmp_path, tensors[:keep], config)
        with pytest.raises(AdapterError, match="truncated, damaged"):
            load_adapter(mlp(), tmp_path)
    header = 8 + struct.unpack("<Q", tensors[:8])[0]
    for bit in range(0, 8 * header, 61):
        flipped = bytearray(tensors)
        flipped[bit // 8] ^= 1 << bit % 8
        write(tmp_path, bytes(flipped), config)
        model = mlp()
        before, y = list(model.modules()), output(model)
        try:
            loaded = load_adapter(model, tmp_path)
        except AdapterError:
            assert list(model.modules()) == before
            assert torch.equal(output(model), y)
        else:  # of the padding, say
            assert bool(torch.isfinite(output(loaded)).all())


def test_headers_and_files(tmp_path, sound):
    tensors, config = sound
    for data in (
        struct.pack("<Q", 2**63) + tensors[8:],
        struct.pack("<Q", 10**8) + tensors[8:],
        b"",
    ):
        write(tmp_path, data, config)
        refused(tmp_path, "truncated, damaged")
    with (tmp_path / TENSORS).open("r+b") as f:
        f.truncate(1 << 40)
    refused(tmp_path, "1,099,511,627,776 bytes")
    (tmp_path / TENSORS).unlink()
    refused(tmp_path, "no such file", FileNotFoundError)
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(tmp_path, r"adapter_model\.bin is a pickle")
    refused(tmp_path / "nowhere", "no such file", FileNotFoundError)


def test_names(tmp_path, sound):
    write(tmp_path, *sound)
    model = adapted("mlp")
    for name in ("", "a.b", None, "spec"):
        with pytest.raises(ValueError, match="name must be a string without dots"):
            load_adapter(model, tmp_path, name)
    for name in ("default", "__base__"):
        with pytest.raises(ValueError, match="is there already"):
            load_adapter(model, tmp_path, name)
    lora = get_peft_model(mlp(), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match=r"of the method .*LORA"):
        load_adapter(lora, tmp_path, "other")


def test_pefts_own_loader_refuses_what_is_not_finite(tmp_path, sound):
    """A net under it: there the layers are wrapped already."""
    write(tmp_path, changed(sound[0], TENSOR_FILES["NaN"][0]), sound[1])
    with pytest.raises(RuntimeError, match=r"lin0\.fastspec_delta\.default holds NaN"):
        PeftModel.from_pretrained(mlp(), tmp_path)
