"""The PEFT bridge: its configuration, and what it refuses with the model left as it was."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from peft_support import adapted, layers, mlp_config, output
from tiny_models import bert, mlp
from torch import nn

import fastspec
from fastspec.peft import SpectralConfig, load_adapter


def test_numbers_of_numpy_are_pythons_own(tmp_path):
    config = SpectralConfig(
        r=np.int64(4),
        seed=np.int32(1),
        target_modules=["lin0", "lin1"],
        rank_pattern={"lin1": np.int64(2)},
    )
    get_peft_model(mlp(), config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["seed"], saved["rank_pattern"]) == (4, 1, {"lin1": 2})
    assert SpectralConfig(select=[np.int64(1), np.int64(3)]).select == (1, 3)


class TestRefused:
    """A clear error, and a model that computes what it did."""

    @pytest.mark.parametrize(
        ("make", "options", "message"),
        [
            (
                lambda: nn.Sequential(nn.Embedding(5, 4)),
                {"target_modules": ["0"]},
                "0: Embedding is not",
            ),
            (
                lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
                {"target_modules": ["out_proj"]},
                "0.out_proj: nn.MultiheadAttention reads",
            ),
            (
                lambda: nn.Sequential(nn.Linear(8, 8, device="meta")),
                {"target_modules": ["0"]},
                "0: the weight is on the meta device",
            ),
            (
                lambda: nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(8, 8))),
                {"target_modules": ["0"]},
                "0: the layer has forward hooks",
            ),
            (
                lambda: nn.Sequential(add_hook_to_module(nn.Linear(8, 8), AlignDevicesHook())),
                {"target_modules": ["0"]},
                "0: the layer has forward hooks or a forward of its own",
            ),
            (
                lambda: fastspec.spectralize(mlp(), fastspec.SpectralConfig(rank=2)),
                {"target_modules": ["lin0"]},
                "lin0: SpectralLinear is an nn.Linear with a forward of its own",
            ),
            (
                mlp,
                {"r": 11, "target_modules": ["lin1", "lin0"]},
                "lin0: rank 11 .* 10 of them; give",
            ),
            (mlp, {"target_modules": ["nothing"]}, "nothing.* not found in the base model"),
        ],
        ids=[
            "embedding",
            "attention",
            "meta",
            "hooks",
            "accelerate's hooks",
            "adapted",
            "rank",
            "no match",
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
    def test_by_name(self, make, options, message):
        model = make()
        before = list(model.modules())
        with pytest.raises((TypeError, ValueError), match=message):
            get_peft_model(model, SpectralConfig(**options))
        assert list(model.modules()) == before

    def test_a_failed_first_adapter_leaves_the_plain_trainable_model(self):
        model = mlp()
        with torch.no_grad():
            model.lin1.weight[0, 0] = torch.nan
        before = list(model.modules())
        with pytest.raises(ValueError, match="non-finite values in lin1"):
            get_peft_model(model, mlp_config())
        assert list(model.modules()) == before
        assert all(p.requires_grad for p in model.parameters())

    def test_a_failed_second_adapter_leaves_the_first(self):
        model = adapted("mlp")
        y = output(model)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        with pytest.raises(ValueError, match="lin0: rank 11"):
            model.add_adapter("other", mlp_config(r=11, target_modules=["lin1", "lin0"]))
        assert list(model.peft_config) == ["default"]
        assert torch.equal(output(model), y)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable

    def test_other_base_weights_under_a_basis(self):
        model = adapted("mlp")
        state = model.state_dict()
        model.load_state_dict(state)
        state["base_model.model.lin0.base_layer.weight"] = torch.ones(20, 10)
        with pytest.raises(RuntimeError, match="the basis was made from other weights"):
            model.load_state_dict(state)


class TestConfig:
    def test_survives_json_and_pickle(self):
        config = SpectralConfig(
            r=0.5,
            core="band",
            select=(1, 4),
            target_modules=["b", "a"],
            rank_pattern={"a": 3},
            task_type="SEQ_CLS",
        )
        text = json.dumps(config.to_dict())
        assert json.loads(text)["target_modules"] == ["a", "b"]
        assert SpectralConfig(**json.loads(text)) == config
        assert pickle.loads(pickle.dumps(config)) == config

    def test_serves_other_base_weights_too(self):
        config = SpectralConfig(r=4, task_type="SEQ_CLS")
        first = get_peft_model(bert(0), config)
        second = get_peft_model(bert(1), config)
        prints = [m.peft_config["default"].base_fingerprint for m in (first, second)]
        assert prints[0] != prints[1]
        assert second.peft_config["default"].target_modules == config.target_modules

    @pytest.mark.parametrize("targets", ["all-linear", "lin.*|head"])
    def test_a_tiny_matrix_keeps_all_it_has(self, tmp_path, targets):
        config = SpectralConfig(r=11, target_modules=targets)
        with pytest.raises(ValueError, match="head: rank 12"):  # which nothing else serves
            get_peft_model(mlp(), dataclasses.replace(config, rank_pattern={"head": 12}))
        model = get_peft_model(mlp(), config)
        ranks = [m.fastspec_delta["default"].shape[-1] for m in layers(model)]
        assert ranks == [10, 11, 2]
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(mlp(), tmp_path)
        load_adapter(mlp(), tmp_path)
        with pytest.raises(ValueError, match="rank 11"):
            get_peft_model(mlp(), mlp_config(r=11))

    def test_rank_pattern(self):
        model = adapted("mlp", r=0.5, rank_pattern={"lin1": "full"})
        ranks = [m.fastspec_delta["default"].shape[-1] for m in layers(model)]
        assert ranks == [5, 12]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"r": 0}, "r must be at least 1"),
            ({"rank_pattern": {"a": 2.0}}, r"rank_pattern\['a'\] as a fraction"),
            ({"core": "full"}, "core must be one of"),
            ({"half_width": 0}, "half_width must be"),
            ({"select": [3, 1]}, "select must be"),
            ({"basis": "qr"}, "basis must be one of"),
            ({"tol": 2}, "tol must lie in"),
            ({"bias": "lora_only"}, "bias must be one of"),
            ({"layers_pattern": "layer"}, "layers_pattern needs layers_to_transform"),
            ({"layers_to_transform": [0], "target_modules": "q"}, "name the modules"),
            ({"task_type": "NONE"}, "Invalid task type"),
            ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ],
        ids=str,
    )
    def test_refuses(self, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            SpectralConfig(**options)

    def test_layers_to_transform(self):
        model = adapted("bert", target_modules=["query"], layers_to_transform=[1])
        (only,) = layers(model)
        assert model.base_model.model.bert.encoder.layer[1].attention.self.query is only

    @pytest.mark.parametrize(("bias", "count"), [("none", 0), ("fastspec_only", 2), ("all", 3)])
    def test_bias(self, bias, count):
        model = adapted("mlp", None, bias=bias, modules_to_save=None)
        trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
        assert len(trained) == count


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (None, "needs PEFT, which is not installed"),
        ("0.22.0", r"PEFT 0\.21\.x .* but PEFT 0\.22\.0"),
    ],
)
def test_the_wrong_peft_is_refused_with_advice(monkeypatch, installed, message):
    import importlib.metadata

    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=message) as e:
        fastspec.peft.require_peft()
    assert "pip install" in str(e.value)
