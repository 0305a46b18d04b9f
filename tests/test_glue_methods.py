"""What each method trains, its learning rates, and that its state goes to disk and back."""

import pytest
import torch
from glue_support import make_model

from fastspec.studies.encoders import load_classifier
from fastspec.studies.glue import methods
from fastspec.studies.glue.config import METHODS, GlueConfig
from fastspec.studies.glue.tasks import TASKS

HIDDEN, INNER, LAYERS = 32, 64, 2
MATRICES = 6 * LAYERS + 1  # and the pooler
BODY_BIASES = LAYERS * (5 * HIDDEN + INNER + 2 * HIDDEN) + HIDDEN + HIDDEN  # LayerNorms, pooler
HEAD = 2 * HIDDEN + 2
LORA_PER_LAYER = 4 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + INNER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def build(folder, **fields):
    config = GlueConfig(task="rte", **{"rank": 8, **fields})
    torch.manual_seed(0)
    model = load_classifier(str(folder), TASKS["rte"])
    heads = methods.head_modules(model, config.train_pooler)
    return methods.apply(model, config), heads, config


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({"method": "head"}, 0),
        ({"method": "bitfit"}, BODY_BIASES),
        ({"method": "lora", "lora_rank": 3}, 3 * (LAYERS * LORA_PER_LAYER + 2 * HIDDEN)),
        ({"method": "pissa", "lora_rank": 3}, 3 * (LAYERS * LORA_PER_LAYER + 2 * HIDDEN)),
        (
            {"method": "lora", "lora_rank": 3, "target_modules": r".*\.query"},
            3 * LAYERS * 2 * HIDDEN,
        ),
        ({"method": "spectral"}, 8 * MATRICES),
        ({"method": "spectral", "core": "dense"}, 64 * MATRICES),
        ({"method": "spectral", "core": "band"}, 24 * MATRICES),
        ({"method": "spectral", "basis": "random"}, 8 * MATRICES),
        ({"method": "spectral", "select": (4, 10)}, 6 * MATRICES),
        ({"method": "spectral", "rank": "full", "path": "reference"}, 32 * MATRICES),
        ({"method": "spectral", "target_modules": r".*\.query"}, 8 * LAYERS),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else str(v),
)
def test_trainable_parameters(fields, adapter, folder):
    model, heads, config = build(folder, **fields)
    assert heads == ["classifier"]
    counts = methods.count_parameters(model, heads)
    assert (counts["adapter"], counts["head"]) == (adapter, HEAD)
    plain = sum(p.numel() for p in load_classifier(str(folder), TASKS["rte"]).parameters())
    extra = 0 if config.method in ("head", "bitfit") else adapter
    assert counts["total"] == plain + extra
    in_groups = [p for g in methods.optimizer_groups(model, heads, config) for p in g["params"]]
    assert sum(p.numel() for p in in_groups) == adapter + HEAD
    assert len({id(p) for p in in_groups}) == len(in_groups)


def test_lora_on_no_layer_is_refused(folder):
    with pytest.raises(ValueError, match=r"target_modules='nothing' matches no linear layer"):
        build(folder, method="lora", target_modules="nothing")


POOLER = HIDDEN * HIDDEN + HIDDEN


@pytest.mark.parametrize(
    ("method", "adapter"),
    [("head", 0), ("spectral", 8 * 6 * LAYERS), ("lora", 8 * LAYERS * LORA_PER_LAYER)],
)
def test_the_pooler_counts_to_the_head_when_asked(method, adapter, folder, tmp_path):
    model, heads, config = build(folder, method=method, train_pooler=True)
    assert heads == ["bert.pooler", "classifier"]
    counts = methods.count_parameters(model, heads)
    assert (counts["adapter"], counts["head"]) == (adapter, POOLER + HEAD)
    head = [
        p
        for g in methods.optimizer_groups(model, heads, config)
        if g["name"] == "head"
        for p in g["params"]
    ]
    assert sum(p.numel() for p in head) == POOLER + HEAD
    for p in head:
        torch.nn.init.normal_(p, std=0.1)
    methods.save(model, config, tmp_path)
    fresh, _, _ = build(folder, method=method, train_pooler=True)
    methods.restore(fresh, config, tmp_path)
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, fresh.eval()(ids).logits)


def test_full_finetuning_trains_everything(folder):
    model, heads, _ = build(folder, method="full")
    counts = methods.count_parameters(model, heads)
    assert counts["adapter"] + counts["head"] == counts["total"]


@pytest.mark.parametrize("method", METHODS)
def test_methods_start_from_the_pretrained_model(method, folder):
    plain = load_classifier(str(folder), TASKS["rte"]).eval()
    model, _, _ = build(folder, method=method)
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 8, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    model.eval()
    with torch.no_grad():
        body = plain.bert(**inputs).pooler_output
        torch.manual_seed(0)
        expected = load_classifier(str(folder), TASKS["rte"]).classifier(body)
        actual = model(**inputs).logits
    # PiSSA splits the weight in two parts whose sum is rounded
    tolerance = 1e-4 if method == "pissa" else 1e-6
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_rates_and_decay_by_kind(folder):
    model, heads, config = build(
        folder,
        train_bias=True,
        train_layernorm=True,
        lr=0.5,
        head_lr=0.25,
        bias_lr=0.125,
        weight_decay=0.01,
    )
    groups = methods.optimizer_groups(model, heads, config)
    seen = {(g["name"], g["lr"], g["weight_decay"]) for g in groups}
    assert seen == {
        ("coefficients", 0.5, 0.0),
        ("extra", 0.125, 0.0),
        ("head", 0.25, 0.01),
        ("head", 0.25, 0.0),
    }
    by_name = {id(p): name for name, p in model.named_parameters()}
    coefficients = [
        by_name[id(p)] for g in groups if g["name"] == "coefficients" for p in g["params"]
    ]
    assert len(coefficients) == MATRICES
    assert all(name.endswith(".delta") for name in coefficients)


def test_coefficients_decay_only_when_asked(folder):
    model, heads, config = build(folder, coefficient_decay=0.1)
    decay = {g["name"]: g["weight_decay"] for g in methods.optimizer_groups(model, heads, config)}
    assert decay == {"coefficients": 0.1, "head": 0.0}


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({"core": "diag"}, 3e-2),
        ({"core": "band"}, 5e-3),
        ({"core": "dense"}, 3e-3),
        ({"method": "lora"}, 1e-3),
        ({"method": "full"}, 1e-4),
    ],
)
def test_default_rates(fields, rate):
    config = GlueConfig(task="rte", **fields)
    assert methods.default_rate(config).value == rate
    assert methods.default_rate(config).source
    main = "coefficients" if config.method == "spectral" else "adapter"
    assert methods.rates(config)[main] == rate
    assert methods.rates(config)["head"] == 1e-3


def test_the_head_method_takes_lr_for_its_head():
    assert methods.rates(GlueConfig(task="rte", method="head", lr=0.5))["head"] == 0.5
    both = GlueConfig(task="rte", method="head", lr=0.5, head_lr=0.25)
    assert methods.rates(both)["head"] == 0.25


@pytest.mark.parametrize("method", METHODS)
def test_trained_state_goes_round(method, folder):
    model, heads, config = build(folder, method=method, lora_rank=2)
    for group in methods.optimizer_groups(model, heads, config):
        for p in group["params"]:
            torch.nn.init.normal_(p, std=0.1)
    state = {name: value.clone() for name, value in methods.trained_state(model).items()}
    fresh, _, _ = build(folder, method=method, lora_rank=2)
    methods.load_trained_state(fresh, state)
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, fresh.eval()(ids).logits)


def test_a_foreign_state_is_refused(folder):
    model, _, _ = build(folder, method="spectral")
    other, _, _ = build(folder, method="bitfit")
    before = {k: v.clone() for k, v in methods.trained_state(model).items()}
    with pytest.raises(ValueError, match="does not hold what this run trains"):
        methods.load_trained_state(model, methods.trained_state(other))
    larger, _, _ = build(folder, method="spectral", rank=9)
    with pytest.raises(ValueError, match=r"delta: expected shape \[8\], got \[9\]"):
        methods.load_trained_state(model, methods.trained_state(larger))
    assert all(torch.equal(v, before[k]) for k, v in methods.trained_state(model).items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "glue"}, "task must be one of cola, sst2"),
        ({"method": "prefix"}, "method must be one of spectral, full"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"max_train_rows": -1}, "max_train_rows must be"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"warmup": 10}, "warmup is a share"),
        ({"seed": -1}, "seed must be an integer"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"select": (3, 3)}, "select must be"),
    ],
)
def test_a_bad_configuration_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GlueConfig(**{"task": "rte", **fields})


def test_a_configuration_survives_json():
    import json

    config = GlueConfig(task="rte", rank="full", select=(0, 4), lr=0.1, max_train_rows=7)
    assert GlueConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_default_folders_differ_where_the_method_does():
    variants = [
        {},
        {"rank": 16},
        {"core": "dense"},
        {"core": "band", "half_width": 2},
        {"select": "trailing"},
        {"select": (0, 32)},
        {"basis": "random"},
        {"train_bias": True},
        {"train_layernorm": True},
        {"train_pooler": True},
        {"path": "reference"},
        {"seed": 1},
        {"method": "lora"},
        {"method": "lora", "lora_rank": 1},
        {"method": "pissa"},
        {"method": "head"},
    ]
    names = [GlueConfig(task="rte", **fields).folder_name() for fields in variants]
    assert len(set(names)) == len(variants)
