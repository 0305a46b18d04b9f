"""The PEFT bridge: which layers and heads a config means, and that no name of it is passed over."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft_support import X, adapted, layers, mlp_config, output, shift
from support import assert_close
from tiny_models import BERT, SIZES, bert, gpt2, llama, mlp
from torch import nn

from fastspec.model.adapter import AdapterError
from fastspec.peft import SpectralConfig, load_adapter

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(3))
IDS[:, [3, 4, 6]] = 2  # separators, of which Longformer wants three

ROBERTA = BERT | {"pad_token_id": 0}
ENCODERS = {  # family to the fields of its configuration
    "Roberta": ROBERTA,
    "XLMRoberta": ROBERTA,
    "MPNet": ROBERTA | {"pad_token_id": 1},
    "Electra": BERT | {"embedding_size": 16},
    "Deberta": BERT,
    "DebertaV2": BERT,
    "ModernBert": SIZES
    | {"intermediate_size": 32, "pad_token_id": 0, "global_attn_every_n_layers": 1}
    | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "XLNet": {"vocab_size": 50, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "Longformer": ROBERTA | {"attention_window": 4, "sep_token_id": 2},
    "DistilBert": {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "Bert": BERT,
    "Albert": BERT | {"embedding_size": 8},
}
DISTINCT = ("Roberta", "XLNet", "ModernBert", "DistilBert")  # in what their heads are made of
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnsweringSimple",
}


def encoder(family: str, task_type: str, seed: int = 0) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**ENCODERS[family])
    name = family + TASKS[task_type]
    kind = getattr(transformers, name, None) or getattr(transformers, name.removesuffix("Simple"))
    torch.manual_seed(seed)
    return kind(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        y = model(input_ids=IDS)
    return y.start_logits if "start_logits" in y else y.logits


def assert_same(family: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal to the bit, but of Longformer, whose plain outputs differ by rounding from call to call."""
    if family == "Longformer":
        assert_close(a, b)
    else:
        assert torch.equal(a, b)


def names_of(model: nn.Module) -> list[str]:
    found = [n for n, m in model.named_modules() if m in layers(model)]
    return [name.removeprefix("base_model.model.") for name in found]


class TestHeads:
    @pytest.mark.parametrize("task_type", TASKS)
    @pytest.mark.parametrize(
        "family",
        [f if f in DISTINCT else pytest.param(f, marks=pytest.mark.slow) for f in ENCODERS],
    )
    def test_all_of_it_is_trained_whole_saved_and_put_back(self, tmp_path, family, task_type):
        base = encoder(family, task_type)
        kind, state = type(base), copy.deepcopy(base.state_dict())
        plain = logits(base)
        config = SpectralConfig(r=4, task_type=task_type)
        model = get_peft_model(base, config).eval()
        assert model.peft_config["default"] is config
        y = logits(model)
        assert_same(family, y, plain)
        with model.disable_adapter():
            assert_same(family, logits(model), y)
        prefix = f"{base.base_model_prefix}."
        outside = [n for n in names_of(model) if not n.startswith(prefix)]
        assert not outside, "a new head has no basis to be adapted in"
        new = {n for n in state if not n.startswith(prefix)}
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        whole = {n.replace(".modules_to_save.default", "") for n in trained if "_delta" not in n}
        assert whole == {f"base_model.model.{n}" for n in new}

        shift(model, scale=0.1)
        y = logits(model)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(encoder(family, task_type), tmp_path).eval()
        assert_same(family, logits(again), y)
        assert_same(family, logits(load_adapter(encoder(family, task_type), tmp_path)), y)
        merged = again.merge_and_unload()
        assert type(merged) is kind
        assert merged.state_dict().keys() == state.keys()
        assert_close(logits(merged), y)
        bare = model.unload()
        assert bare.state_dict().keys() == state.keys()
        for name, tensor in bare.state_dict().items():
            assert torch.equal(tensor, state[name]) == (name not in new)

    @pytest.mark.parametrize("family", ["Roberta", "XLNet", "ModernBert"])
    def test_other_base_weights_are_refused_with_the_model_as_it_was(self, tmp_path, family):
        model = get_peft_model(encoder(family, "SEQ_CLS"), SpectralConfig(r=4, task_type="SEQ_CLS"))
        model.save_pretrained(tmp_path)
        other = encoder(family, "SEQ_CLS", seed=1)
        before, y = list(other.modules()), logits(other)
        with pytest.raises(AdapterError, match="made from other base weights"):
            PeftModel.from_pretrained(other, tmp_path)
        assert list(other.modules()) == before
        assert torch.equal(logits(other), y)
        assert all(p.requires_grad for p in other.parameters())

    def test_without_peft_s_model_classes_too(self, tmp_path):
        model = encoder("Roberta", "TOKEN_CLS")
        model.add_adapter(SpectralConfig(r=4, task_type="TOKEN_CLS"), "a")
        shift(model)
        model.save_pretrained(tmp_path)
        again = encoder("Roberta", "TOKEN_CLS")
        again.load_adapter(tmp_path)
        assert torch.equal(logits(again), logits(model))
        assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
            "roberta",
            "classifier",
        }

    def test_named_ones_are_all_that_is_trained_beside_peft_s_own(self):
        config = SpectralConfig(r=4, task_type="SEQ_CLS", modules_to_save=["logits_proj"])
        model = get_peft_model(encoder("XLNet", "SEQ_CLS"), config)
        assert config.modules_to_save == ["logits_proj", "classifier", "score"]
        assert names_of(model)[-1] == "sequence_summary.summary"

    def test_one_that_targets_reach_into_is_adapted(self):
        config = SpectralConfig(r=4, task_type="SEQ_CLS", target_modules=["q", "summary"])
        # XLNet's projections are parameters of their own, so of these names only the head's is a layer
        with pytest.raises(ValueError, match="'q', which was not found"):
            get_peft_model(encoder("XLNet", "SEQ_CLS"), config)
        config = SpectralConfig(r=4, task_type="SEQ_CLS", target_modules=["layer_1", "summary"])
        model = get_peft_model(encoder("XLNet", "SEQ_CLS"), config)
        assert "sequence_summary.summary" in names_of(model)
        assert config.modules_to_save == ["classifier", "score", "logits_proj"]

    def test_of_another_adapter_are_not_adapted_by_the_next(self):
        model = get_peft_model(mlp(), mlp_config())
        model.add_adapter("other", SpectralConfig(r=2))
        assert names_of(model) == ["lin0", "lin1"]


class TestTheConfig:
    def test_is_peft_s_own_object_and_serves_again_as_it_was_given(self):
        config = SpectralConfig(r=4, task_type="TOKEN_CLS")
        first = get_peft_model(encoder("Roberta", "TOKEN_CLS"), config)
        assert first.peft_config["default"] is config
        written = config.to_dict()
        assert written["modules_to_save"] == ["classifier", "score"]
        # other weights, and other names of layers
        second = get_peft_model(encoder("DistilBert", "TOKEN_CLS", seed=1), config)
        assert second.peft_config["default"] is not config
        assert config.to_dict() == written
        assert {"q_lin", "v_lin"} <= {n.rpartition(".")[2] for n in names_of(second)}

    def test_is_the_same_object_where_it_comes_to_the_same(self, tmp_path):
        config = mlp_config()
        get_peft_model(mlp(), config).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(mlp(), tmp_path, config=config)
        assert loaded.peft_config["default"] is config
        assert config.inference_mode

    def test_a_change_made_meanwhile_holds(self):
        config = mlp_config()
        get_peft_model(mlp(), config)
        config.r, config.target_modules = 2, {"lin1"}
        model = get_peft_model(mlp(1), config)
        assert names_of(model) == ["lin1"]
        assert layers(model)[0].fastspec_delta["default"].shape == (2,)

    def test_of_a_refused_adapter_is_as_it_was_given(self):
        base = mlp()
        with torch.no_grad():
            base.lin1.weight[0, 0] = torch.nan
        config = SpectralConfig(r=2)
        with pytest.raises(ValueError, match="non-finite values in lin1"):
            get_peft_model(base, config)
        assert config.target_modules == "all-linear"
        get_peft_model(bert(), config)

    def test_helpers_of_peft_about_casts_find_their_switch(self):
        model = adapted("mlp")
        y = output(model)
        with disable_input_dtype_casting(model):
            assert torch.equal(model(X), y)
        assert layers(model)[0].cast_input_dtype_enabled


class TestLayersToTransform:
    @pytest.mark.parametrize("targets", ["all-linear", None, "names", "full names"])
    @pytest.mark.parametrize("pattern", [None, [], "", "layers", ["layers"]], ids=repr)
    def test_picks_among_them_however_they_are_named(self, targets, pattern):
        base = llama()
        every = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        wanted = [n for n in every if ".layers.0." in n]
        assert len(wanted) == 7
        config = SpectralConfig(
            r=4,
            target_modules={
                "names": sorted({n.rpartition(".")[2] for n in every}),
                "full names": every,
            }.get(targets, targets),
            layers_to_transform=[0],
            layers_pattern=pattern,
            task_type="CAUSAL_LM",
        )
        assert names_of(get_peft_model(base, config)) == wanted

    def test_also_where_peft_shortens_the_names(self):
        base = llama(num_hidden_layers=4)  # above 20 names
        config = SpectralConfig(r=4, layers_to_transform=2, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        assert {n.split(".")[2] for n in names_of(model)} == {"2"}
        assert len(names_of(model)) == 7

    @pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
    @pytest.mark.parametrize(
        "options", [{"layers_to_transform": [0, 2]}, {"layers_pattern": "h"}], ids=str
    )
    def test_a_layer_that_is_not_there_is_refused(self, targets, options):
        options = {"target_modules": targets, "layers_to_transform": [0], **options}
        base = llama()
        before = list(base.modules())
        with pytest.raises(ValueError, match=r"none of the\s+targets is in a layer [02]"):
            get_peft_model(base, SpectralConfig(r=4, **options))
        assert list(base.modules()) == before

    def test_a_pattern_without_layers_and_an_expression_with_them(self):
        with pytest.raises(ValueError, match="layers_pattern needs layers_to_transform"):
            SpectralConfig(layers_pattern=["h"])
        with pytest.raises(ValueError, match="picks among a list"):
            SpectralConfig(target_modules=".*q_proj", layers_to_transform=[0])
        SpectralConfig(target_modules=".*q_proj", layers_pattern=[], layers_to_transform=[])


class TestNames:
    @pytest.mark.parametrize(
        ("make", "options", "message"),
        [
            (gpt2, {"target_modules": ["c_attn", "c_atn"]}, "target_modules names 'c_atn'"),
            (
                bert,
                {"target_modules": "all-linear", "exclude_modules": ["pooller"]},
                "exclude_modules names 'pooller'",
            ),
            (
                bert,
                {"exclude_modules": ["pooler"]},
                "'pooler'.* name what is inside it: bert.pooler.dense",
            ),
            (
                bert,
                {"target_modules": ["query"], "modules_to_save": ["clasifier"]},
                "modules_to_save names 'clasifier'",
            ),
        ],
        ids=["target", "exclude", "container", "save"],
    )
    def test_one_that_matches_nothing_among_several_is_refused(self, make, options, message):
        base = make()
        before = list(base.modules())
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, SpectralConfig(r=4, **options))
        assert list(base.modules()) == before
        assert all(p.requires_grad for p in base.parameters())

    def test_experts_of_three_dimensions(self):
        fields = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32}
        moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**fields, **moe))
        with pytest.raises(ValueError, match=r"'gate_proj'.*experts\.gate_up_proj.* 3-D"):
            get_peft_model(base, SpectralConfig(r=4, target_modules=["q_proj", "gate_proj"]))
        with pytest.warns(UserWarning, match="are stacks of matrices"):
            get_peft_model(base, SpectralConfig(r=4, task_type="CAUSAL_LM"))

    def test_experts_beside_linear_layers_of_their_name(self):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.down_proj = nn.Linear(8, 8)
                self.experts = nn.Module()
                self.experts.down_proj = nn.Parameter(torch.randn(2, 8, 8))

        with pytest.warns(UserWarning, match=r"adapted, but experts\.down_proj are experts"):
            get_peft_model(Mixed(), SpectralConfig(r=4, target_modules=["down_proj"]))
