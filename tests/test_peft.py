"""The PEFT bridge: the behaviour PEFT's own tests ask of every method, and that it runs our operator."""

import copy
import io
import json
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from peft.tuners.tuners_utils import replicate_layers
from peft_support import (
    CASES,
    CORES,
    PREFIX,
    X,
    adapted,
    bert,
    gpt2,
    layers,
    mlp,
    mlp_config,
    output,
    shift,
)
from support import assert_close
from torch import nn

import fastspec
from fastspec.peft import SpectralConfig
from fastspec.peft import layer as peft_layer
from fastspec.peft.layer import SpectralLinear


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("core", CORES, ids=lambda o: o["core"])
def test_a_fresh_adapter_is_the_base_model_bit_for_bit(case, core):
    make, _ = CASES[case]
    assert torch.equal(output(adapted(case, None, **core)), output(make()))


@pytest.mark.parametrize("make", [mlp, bert, gpt2])
@pytest.mark.parametrize("core", CORES, ids=lambda o: o["core"])
def test_it_computes_what_spectralize_computes_gradients_too(make, core):
    """The same operator on the same factors: equal to the last bit."""
    heads = ["head", "classifier", "lm_head"]
    ours = get_peft_model(make(), SpectralConfig(r=4, exclude_modules=heads, **core)).eval()
    names = [
        n.removeprefix(PREFIX) for n, m in ours.named_modules() if isinstance(m, SpectralLinear)
    ]
    direct = fastspec.spectralize(
        make(),
        fastspec.SpectralConfig(rank=4, target_modules=names, modules_to_save=[], **core),
    )
    shift(ours)
    pairs = [
        (layer.fastspec_delta["default"], direct.get_submodule(name).delta)
        for name, layer in zip(names, layers(ours), strict=True)
    ]
    with torch.no_grad():
        for mine, theirs in pairs:
            theirs.copy_(mine)
    y, z = output(ours), output(direct)
    assert torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    for mine, theirs in pairs:
        assert mine.grad.abs().max() > 0
        assert torch.equal(mine.grad, theirs.grad)


def test_every_adapted_call_goes_through_the_public_operator(monkeypatch):
    calls = []
    real = peft_layer.spectral_linear

    def counted(*args, **kwargs):
        calls.append(kwargs["singular_basis"])
        return real(*args, **kwargs)

    monkeypatch.setattr(peft_layer, "spectral_linear", counted)
    model = adapted("bert")
    output(model)
    assert calls == [True] * len(layers(model))


@pytest.mark.parametrize("case", CASES)
def test_training_moves_the_adapter_and_nothing_else(case):
    model = adapted(case, None)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output(model).square().mean().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    expected = {n for n in before if ".fastspec_delta." in n or ".modules_to_save." in n}
    assert moved == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected


def test_counts_of_parameters(capsys):
    model = adapted("bert", None, r=4)
    model.print_trainable_parameters()
    # 13 layers of 4 coefficients, a head of 32 x 3 + 3
    assert "trainable params: 151 ||" in capsys.readouterr().out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("core", CORES, ids=lambda o: o["core"])
def test_merging_changes_nothing_but_cost_and_unmerging_is_exact(case, core):
    model = adapted(case, **core)
    y = output(model)
    weights = [layer.base_layer.weight for layer in layers(model)]
    values = [w.detach().clone() for w in weights]
    model.merge_adapter(safe_merge=True)
    assert all(layer.merged for layer in layers(model))
    assert not any(
        torch.equal(a.base_layer.weight, v) for a, v in zip(layers(model), values, strict=True)
    )
    assert_close(output(model), y)
    model.unmerge_adapter()
    assert all(
        layer.base_layer.weight is w for layer, w in zip(layers(model), weights, strict=True)
    )
    assert all(torch.equal(w, v) for w, v in zip(weights, values, strict=True))
    assert torch.equal(output(model), y)


@pytest.mark.parametrize("case", CASES)
def test_merge_and_unload_leaves_the_plain_architecture(case):
    model = adapted(case)
    y = output(model)
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is type(CASES[case][0]())
    assert plain.state_dict().keys() == CASES[case][0]().state_dict().keys()
    assert_close(output(plain), y)


@pytest.mark.parametrize("case", CASES)
def test_unload_gives_the_base_model_back(case):
    """All but the heads: PEFT keeps the active adapter's."""
    base = CASES[case][0]().state_dict()
    plain = adapted(case).unload().state_dict()
    assert plain.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], plain[name])}
    assert all(name.startswith(("head.", "classifier.")) for name in changed)


def test_safe_merge_refuses_what_is_not_finite():
    model = adapted("mlp")
    weight = layers(model)[0].base_layer.weight
    with torch.no_grad():
        layers(model)[0].fastspec_delta["default"][0] = torch.nan
    with pytest.raises(ValueError, match="adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert layers(model)[0].base_layer.weight is weight
    assert not layers(model)[0].merged


def test_a_merged_model_can_be_moved_and_cast_before_it_is_unmerged():
    model = adapted("mlp")
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    for name, plain in (("lin0", mlp().lin0), ("lin1", mlp().lin1)):
        weight = model.base_model.model.get_submodule(name).base_layer.weight
        assert torch.equal(weight, plain.weight.double())


def test_disabling_gives_the_base_model_also_while_merged():
    model, base = adapted("bert"), output(bert())
    y = output(model)
    assert not torch.allclose(y, base)
    with model.disable_adapter():
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), y)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), y)


class TestSeveralAdapters:
    def test_switching_deleting_and_their_independence(self):
        model = adapted("bert")
        y = output(model)
        model.add_adapter("other", SpectralConfig(r=2, core="dense", task_type="SEQ_CLS"))
        assert torch.equal(output(model), y)
        model.set_adapter("other")
        assert torch.equal(output(model), output(bert()))
        shift(model, 5)
        z = output(model)
        assert not torch.allclose(z, y)
        model.set_adapter("default")
        assert torch.equal(output(model), y)
        model.delete_adapter("default")
        assert torch.equal(output(model), z)
        assert all(
            list(m.fastspec_basis) == list(m.fastspec_form) == ["other"] for m in layers(model)
        )

    def test_only_the_active_one_trains(self):
        model = adapted("mlp")
        model.add_adapter("other", mlp_config())
        for name in ("other", "default"):
            model.set_adapter(name)
            trained = [n for n, p in model.named_parameters() if p.requires_grad]
            assert trained
            assert all(f".{name}" in n for n in trained)

    @pytest.mark.parametrize(
        ("first", "second", "shared"),
        [
            ({"r": 6}, {"r": 4, "core": "dense"}, True),
            ({"r": 4}, {"r": 6}, False),
            ({"r": "full"}, {"r": 3, "select": "trailing"}, True),
            ({"r": "full"}, {"select": (2, 7)}, True),
            ({"r": 6}, {"select": (4, 7)}, False),
            ({"r": 6}, {"r": 6, "seed": 1}, False),
            ({"r": 6, "basis": "random"}, {"r": 6, "basis": "random"}, True),
            ({"r": 6, "basis": "random"}, {"r": 4, "basis": "random"}, False),
        ],
        ids=str,
    )
    def test_one_basis_serves_all_whose_directions_it_holds(
        self, monkeypatch, first, second, shared
    ):
        from fastspec.peft import model as peft_model

        model = adapted("mlp", **first)
        factorized = []
        real = peft_model.factorize

        def watched(matrices, *args, **kwargs):
            factorized.extend(matrices)
            return real(matrices, *args, **kwargs)

        monkeypatch.setattr(peft_model, "factorize", watched)
        model.add_adapter("other", mlp_config(**second))
        assert len(factorized) == (0 if shared else 2)
        model.set_adapter("other")
        shift(model, 5)
        alone = get_peft_model(mlp(), mlp_config(**second)).eval()
        for mine, theirs in zip(layers(model), layers(alone), strict=True):
            assert (mine.fastspec_basis["other"] is mine.fastspec_basis["default"]) == shared
            theirs.fastspec_delta["default"] = mine.fastspec_delta["other"]
        head = model.base_model.model.head.modules_to_save["other"]
        alone.base_model.model.head.modules_to_save["default"] = head
        # the same singular triplets to the tolerance of their residual
        torch.testing.assert_close(output(model), output(alone), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("second", [{}, {"r": 3, "core": "dense"}], ids=["alike", "unlike"])
    def test_active_together_they_add_up(self, second):
        model = get_peft_model(mlp(), mlp_config(modules_to_save=None)).eval()
        model.add_adapter("other", mlp_config(modules_to_save=None, **second))
        for name in ("default", "other"):
            model.set_adapter(name)
            shift(model, 7)
        model.base_model.set_adapter(["default", "other"])
        y = output(model)
        plain = mlp()
        with torch.no_grad():
            for name in ("lin0", "lin1"):
                layer = model.base_model.model.get_submodule(name)
                for adapter in ("default", "other"):
                    plain.get_submodule(name).weight += layer.get_delta_weight(adapter)
        assert_close(y, output(plain))
        y.sum().backward()
        assert all(p.grad is not None for m in layers(model) for p in m.fastspec_delta.values())
        model.merge_adapter()
        assert_close(output(model), y)

    def test_layers_that_share_a_weight_share_its_basis(self):
        base = bert()
        replicate_layers(base, [[0, 2], [0, 2]])
        model = get_peft_model(base, SpectralConfig(r=4, task_type="SEQ_CLS")).eval()
        encoder = model.base_model.model.bert.encoder.layer
        first, again = encoder[0].output.dense, encoder[2].output.dense
        assert first.fastspec_basis["default"] is again.fastspec_basis["default"]
        assert first.fastspec_delta["default"] is not again.fastspec_delta["default"]


@pytest.mark.parametrize("case", CASES)
def test_sixteen_bit_weights_keep_float32_coefficients(case):
    make, options = CASES[case]
    base = make().to(torch.bfloat16)
    model = get_peft_model(base, SpectralConfig(r=4, **options)).eval()
    shift(model)
    x = {"mlp": X.to(torch.bfloat16)}
    y = model(x[case]) if case in x else output(model)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for layer in layers(model):
        assert layer.fastspec_delta["default"].dtype == torch.float32
        assert layer.fastspec_delta["default"].grad.dtype == torch.float32


def test_casting_an_adapted_model_keeps_coefficients_and_forgets_the_identity():
    model = adapted("bert")
    before = [layer.fastspec_delta["default"].clone() for layer in layers(model)]
    output(model).sum().backward()
    y = output(model)
    model.to(torch.bfloat16)
    for layer, delta in zip(layers(model), before, strict=True):
        assert torch.equal(layer.fastspec_delta["default"], delta)
        assert layer.fastspec_delta["default"].grad.dtype == torch.float32
        basis = layer.fastspec_basis["default"]
        assert (basis.u.dtype, basis.s.dtype) == (torch.bfloat16, torch.float32)
        assert not basis.singular
    assert_close(output(model), y, torch.bfloat16)


def test_autocast_gives_sixteen_bit_outputs_near_the_full_ones():
    model = adapted("bert")
    y = output(model)
    with torch.autocast("cpu", torch.bfloat16):
        z = output(model)
    assert z.dtype == torch.bfloat16
    assert_close(z, y, torch.bfloat16)


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, checkpointed = adapted("bert").train(), adapted("bert").train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        output(model).sum().backward()
    for a, b in zip(layers(plain), layers(checkpointed), strict=True):
        assert torch.equal(a.fastspec_delta["default"].grad, b.fastspec_delta["default"].grad)


def test_copies_and_pickles_of_the_whole_model():
    model = adapted("bert")
    y = output(model)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), y)
    shift(twin, 3)
    assert torch.equal(output(model), y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(output(torch.load(buffer, weights_only=False)), y)


def test_torch_compile_whole_and_once():
    model = adapted("mlp")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(output(compiled), output(model))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_the_fused_paths_of_encoders_are_not_taken(padded):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = get_peft_model(
        nn.TransformerEncoder(block, 2), SpectralConfig(r=4, target_modules=["linear1", "linear2"])
    ).eval()
    shift(model)
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    kept = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    slow = model(x, src_key_padding_mask=mask)  # with gradients on, torch never takes them
    assert_close(fast[kept], slow[kept])
    with model.disable_adapter():
        assert not torch.allclose(fast, model(x, src_key_padding_mask=mask))


def test_printing_says_what_runs():
    model = adapted("mlp", core="dense")
    shown = str(layers(model)[0])
    assert "default: dense of rank 4, plan=" in shown
    assert "FrozenBasis(rank=4, select=leading, basis=svd, dtype=float32)" in shown
    model.merge_adapter()
    assert "merged=['default']" in str(layers(model)[0])


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

    def test_is_not_changed_by_its_use(self):
        config = SpectralConfig(r=4, task_type="SEQ_CLS")
        get_peft_model(bert(0), config)
        assert config.target_modules == "all-linear"
        get_peft_model(bert(1), config)  # other base weights

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
            ({"layers_to_transform": [0]}, "name the modules"),
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
