"""The PEFT bridge: the behaviour PEFT's own tests ask of every method, and that it runs our operator."""

import copy
import io

import pytest
import torch
from peft import get_peft_model
from peft_support import CASES, CORES, PREFIX, X, adapted, layers, output, shift
from support import assert_close
from tiny_models import bert, gpt2, mlp
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


@pytest.mark.parametrize(
    ("make", "head"),
    [(mlp, "head"), (bert, "classifier"), (gpt2, "lm_head")],
    ids=["mlp", "bert", "gpt2"],
)
@pytest.mark.parametrize("core", CORES, ids=lambda o: o["core"])
def test_it_computes_what_spectralize_computes_gradients_too(make, head, core):
    """The same operator on the same factors: equal to the last bit."""
    ours = get_peft_model(make(), SpectralConfig(r=4, exclude_modules=[head], **core)).eval()
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
    # 13 layers of 4 coefficients, a head of 16 x 2 + 2
    assert "trainable params: 86 ||" in capsys.readouterr().out


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
    assert bool(changed) == (case != "gpt2"), "which has no head of its own"
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
        assert not basis.singular_basis
    assert_close(output(model), y, torch.bfloat16)


def test_autocast_gives_sixteen_bit_outputs_near_the_full_ones():
    model = adapted("bert")
    y = output(model)
    with torch.autocast("cpu", torch.bfloat16):
        z = output(model)
    assert z.dtype == torch.bfloat16
    assert_close(z, y, torch.bfloat16)


def test_gradient_checkpointing_gives_the_same_gradients():
    # of a width whose plan is the same where the input has a gradient, as checkpointing makes it have
    base = [bert(hidden_size=32) for _ in range(2)]
    config = SpectralConfig(r=4, task_type="SEQ_CLS")
    plain, checkpointed = (get_peft_model(model, config).train() for model in base)
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        shift(model)
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
    model = get_peft_model(nn.TransformerEncoder(block, 2), SpectralConfig(r=4)).eval()
    assert len(layers(model)) == 4  # all-linear, but for what nn.MultiheadAttention reads itself
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


@pytest.mark.parametrize("core", CORES, ids=lambda o: o["core"])
def test_merging_and_exporting_under_autocast_is_exact(core):
    model = adapted("mlp", **core)
    layer = layers(model)[0]
    want = (layer.get_delta_weight("default"), *layer.update_factors("default"))
    with torch.autocast("cpu", torch.bfloat16):
        got = (layer.get_delta_weight("default"), *layer.update_factors("default"))
        model.merge_adapter()
    merged = layer.base_layer.weight.detach().clone()
    model.unmerge_adapter()
    model.merge_adapter()
    assert torch.equal(merged, layer.base_layer.weight)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
