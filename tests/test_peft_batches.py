"""The PEFT bridge: every row of a batch through the adapter it names (`adapter_names`)."""

import pytest
import torch
from peft import get_peft_model
from peft_support import CORES, IDS, layers, mlp_config, output, shift
from support import assert_close
from tiny_models import bert, gpt2, mlp, t5

from fastspec.peft import SpectralConfig
from fastspec.peft import layer as peft_layer

NAMES = ["one", "__base__", "two", "one", "three", "__base__"]


def three_adapters(make, *configs):
    """A model with the adapters one, two and three, all shifted."""
    model = get_peft_model(make(), configs[0], adapter_name="one")
    for name, config in zip(("two", "three"), configs[1:], strict=True):
        model.add_adapter(name, config)
    for seed, name in enumerate(("one", "two", "three")):
        model.set_adapter(name)
        shift(model, seed)
    return model.eval()


def bert_with_three(*options):
    options = options or ({}, {}, {})
    return three_adapters(bert, *(SpectralConfig(r=4, task_type="SEQ_CLS", **o) for o in options))


def separately(model, name):
    """The whole batch through one adapter."""
    if name == "__base__":
        with model.disable_adapter():
            return output(model)
    model.set_adapter(name)
    return output(model)


UNLIKE = ({"core": "diag"}, {"core": "dense", "rank_pattern": {"query": 2}}, {"seed": 1})


@pytest.mark.parametrize(
    "options",
    [(c, c, c) for c in CORES] + [UNLIKE],
    ids=[c["core"] for c in CORES] + ["unlike"],
)
def test_each_row_is_as_in_a_run_of_its_own(options):
    model = bert_with_three(*options)
    mixed = output(model, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        expected = separately(model, name)[row]
        assert_close(mixed[row], expected)
        others = set(NAMES) - {name}
        assert not any(
            torch.allclose(mixed[row], separately(model, n)[row], atol=1e-3) for n in others
        )


def test_base_rows_are_the_base_model_bit_for_bit():
    configs = [SpectralConfig(r=4, exclude_modules=["classifier"])] * 3
    model = three_adapters(bert, *configs)
    base = output(bert())
    mixed = output(model, adapter_names=NAMES)
    assert torch.equal(mixed[1], base[1])
    assert torch.equal(mixed[5], base[5])
    assert torch.equal(output(model, adapter_names=["__base__"] * 6), base)


def test_adapters_of_one_kind_go_through_a_layer_together(monkeypatch):
    calls = []
    real = peft_layer.task_linear

    def counted(*args, **kwargs):
        calls.append(args[0].shape[0])
        return real(*args, **kwargs)

    monkeypatch.setattr(peft_layer, "task_linear", counted)
    model = bert_with_three()
    output(model, adapter_names=NAMES)
    assert calls == [len(NAMES)] * len(layers(model))


def test_which_adapter_is_active_does_not_matter():
    model = bert_with_three()
    model.set_adapter("one")
    y = output(model, adapter_names=NAMES)
    model.set_adapter("three")
    assert torch.equal(output(model, adapter_names=NAMES), y)


def test_a_batch_of_one_name_is_that_adapter():
    model = bert_with_three()
    assert torch.equal(output(model, adapter_names=["two"] * 6), separately(model, "two"))


def test_layers_that_an_adapter_does_not_touch_stay_plain_for_its_rows():
    configs = [mlp_config(target_modules=t) for t in (["lin0"], ["lin1"], ["lin0", "lin1"])]
    model = three_adapters(mlp, *configs)
    names = ["one", "two", "three", "__base__", "two", "one", "three", "three"]
    mixed = output(model, adapter_names=names)
    for row, name in enumerate(names):
        assert_close(mixed[row], separately(model, name)[row])


def test_gradients_reach_each_rows_own_adapter():
    model = bert_with_three()
    model.base_model.set_requires_grad(["one", "two", "three"])
    names = ["one", "two", "two", "__base__", "two", "one"]
    output(model, adapter_names=names).sum().backward()
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    mixed = {name: p.grad for name, p in query.fastspec_delta.items()}
    assert mixed["three"] is None or not mixed["three"].any()
    for name in ("one", "two"):
        model.zero_grad()
        rows = [i for i, n in enumerate(names) if n == name]
        separately(model, name)[rows].sum().backward()
        assert_close(mixed[name], query.fastspec_delta[name].grad)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_names_rows_too_also_with_beams(beams):
    config = SpectralConfig(r=4, task_type="CAUSAL_LM")
    model = three_adapters(gpt2, config, config, config)
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "attention_mask": IDS > 0}
    mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **how)
    for name in set(NAMES) - {"__base__"}:
        model.set_adapter(name)
        alone = model.generate(input_ids=IDS, **how)
        rows = [i for i, n in enumerate(NAMES) if n == name]
        assert torch.equal(mixed[rows], alone[rows])


def test_beams_repeat_the_rows_of_a_decoder_but_not_of_its_encoder():
    config = SpectralConfig(r=4, task_type="SEQ_2_SEQ_LM")
    model = three_adapters(t5, config, config, config)
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "attention_mask": IDS > 0}
    mixed = model.generate(input_ids=IDS, adapter_names=NAMES, **how)
    for name in ("one", "two", "three"):
        model.set_adapter(name)
        alone = model.generate(input_ids=IDS, **how)
        rows = [i for i, n in enumerate(NAMES) if n == name]
        assert torch.equal(mixed[rows], alone[rows])


class TestRefused:
    def test_unknown_names_before_anything_runs(self):
        model = bert_with_three()
        ran = []
        model.base_model.model.bert.register_forward_pre_hook(lambda *_: ran.append(1))
        with pytest.raises(ValueError, match=r"non-existing adapter.*: four"):
            output(model, adapter_names=["one", "four", *NAMES[2:]])
        assert not ran

    def test_training_mode(self):
        with pytest.raises(ValueError, match="in training mode"):
            output(bert_with_three().train(), adapter_names=NAMES)

    def test_another_number_of_rows(self):
        with pytest.raises(ValueError, match="same as the number of inputs, but got 5 and 6"):
            output(bert_with_three(), adapter_names=NAMES[:5])

    def test_merged_adapters(self):
        model = bert_with_three()
        model.merge_adapter()
        with pytest.raises(ValueError, match="when there are merged adapters"):
            output(model, adapter_names=NAMES)

    def test_nothing_is_left_behind_by_a_failed_call(self):
        model = bert_with_three()
        y = output(model)
        with pytest.raises(ValueError, match="same as the number"):
            output(model, adapter_names=NAMES[:5])
        assert not any(m._forward_pre_hooks for m in layers(model))
        assert torch.equal(output(model), y)


def test_disabled_adapters_win_over_names():
    model = bert_with_three()
    with model.disable_adapter():
        assert torch.equal(output(model, adapter_names=NAMES), output(bert()))
