"""A quantised base: the layer is the dequantised weight and the correction; what needs W is refused."""

import importlib.util

import pytest
import torch
from quantised_support import CASES, CONFIGS, OTHER, dequantised, quantised_plain
from support import assert_close, minilm_path
from tiny_models import IDS, Net

import fastspec
from fastspec import SpectralConfig, load_adapter, save_adapter, spectralize
from fastspec.cli import main
from fastspec.cores import CORES
from fastspec.model.adapter import AdapterError
from fastspec.model.quantized import memory_table, quantize_base, stored_bytes
from fastspec.model.targets import spectral_layers
from fastspec.ops import reference


def adapted(core="diag", shift=0.3):
    torch.manual_seed(0)
    model = spectralize(Net(), SpectralConfig(rank=4, core=core))
    g = torch.Generator().manual_seed(1)
    for _, layer in spectral_layers(model):
        layer.delta.data.copy_(shift * torch.randn(layer.delta.shape, generator=g))
    return model


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("config", CASES)
def test_a_layer_is_the_dequantised_weight_and_the_correction(config, core):
    model = adapted(core)
    factors = {n: layer.u.clone() for n, layer in spectral_layers(model)}
    quantize_base(model, config)
    for name, layer in spectral_layers(model):
        assert torch.equal(layer.u, factors[name]), "the factors are those of the original weight"
        w = dequantised(layer.weight)
        x = torch.randn(3, 5, w.shape[1], requires_grad=True)
        g = torch.randn(3, 5, w.shape[0])
        y = layer(x)
        delta = layer.delta.detach().clone().requires_grad_()
        x2 = x.detach().clone().requires_grad_()
        want = reference.spectral_linear(x2, w, layer.bias, layer.u, layer.vh, delta, core)
        assert_close(y, want)
        got = torch.autograd.grad(y, [x, layer.delta], g)
        for a, b in zip(got, torch.autograd.grad(want, [x2, delta], g), strict=True):
            assert_close(a, b)
        if core == "diag":
            assert not torch.allclose(y, layer._plain(x)), "the coefficients count"


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("config", CASES)
def test_a_layer_under_autocast(config, core):
    model = adapted(core)
    quantize_base(model, config)
    for _, layer in spectral_layers(model):
        x = torch.randn(3, 5, layer.in_features, requires_grad=True)
        exact = torch.autograd.grad(layer(x).sum(), [x, layer.delta])
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype == layer._plain(x).dtype
        assert_close(y, layer(x), torch.bfloat16)
        got = torch.autograd.grad(y.float().sum(), [x, layer.delta])
        for a, b in zip(got, exact, strict=True):
            assert a.dtype == b.dtype
            assert_close(a, b, torch.bfloat16)


@torch.no_grad()
def test_packed_int4_serves():
    """torchao's prototype for CPUs: a forward alone, equal to its own product and the correction."""
    prototype = pytest.importorskip("torchao.prototype.quantization.int4")
    torch.manual_seed(0)
    model = spectralize(Net(64), SpectralConfig(rank=4))
    quantize_base(model, prototype.PrototypeInt4WeightOnlyConfig(group_size=32))
    for _, layer in spectral_layers(model):
        layer.delta.normal_()
        x = torch.randn(3, 5, layer.in_features)
        base = torch.nn.functional.linear(x, layer.weight, layer.bias)
        want = base + (x @ layer.vh.mT * layer.delta) @ layer.u.mT
        assert_close(layer(x), want)
        assert not torch.allclose(base, want, atol=1e-2), "the coefficients count"
        w = torch.nn.functional.linear(torch.eye(layer.in_features), layer.weight)
        assert_close(torch.nn.functional.linear(x, w.mT, layer.bias), base, torch.bfloat16)


@pytest.mark.parametrize("config", CASES)
def test_untrained_it_is_the_quantised_model(config):
    torch.manual_seed(0)
    plain = quantised_plain(Net(), config)
    assert torch.equal(quantize_base(adapted(shift=0.0), config)(IDS), plain(IDS))


@pytest.mark.parametrize("config", CASES)
def test_it_learns_without_keeping_the_inputs(config):
    model = quantize_base(adapted(), config)
    layer = model.blocks[0].up
    kept = []
    x = torch.randn(7, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert kept
    assert all(t.shape != x.shape for t in kept)
    optimizer = torch.optim.AdamW(fastspec.parameter_groups(model, 3e-2, head_lr=1e-3))
    losses = []
    for _ in range(5):
        loss = model(IDS).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("config", CASES)
def test_adapters_of_a_quantised_base(tmp_path, config):
    model = quantize_base(adapted(), config)
    save_adapter(model, tmp_path)
    again = load_adapter(quantize_base(adapted(shift=0.0), config), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    for other in (adapted(), quantize_base(adapted(), OTHER)):
        with pytest.raises(AdapterError, match="other base weights"):
            load_adapter(other, tmp_path)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("config", CASES)
def test_state_dicts_of_a_quantised_base(config, assign):
    """Equal weights load; others would lie over factors that are not theirs."""
    model = quantize_base(adapted(), config)
    fresh = quantize_base(adapted(shift=0.0), config)
    fresh.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(fresh(IDS), model(IDS))

    other = adapted()
    with torch.no_grad():
        other.blocks[1].up.weight.copy_(other.blocks[1].up.weight.flip(0))
    before = {n: dequantised(layer.weight) for n, layer in spectral_layers(fresh)}
    for state in (quantize_base(other, config).state_dict(), adapted().state_dict()):
        with pytest.raises(
            RuntimeError, match=r"blocks\.1\.up\.weight: the base here is quantised"
        ):
            fresh.load_state_dict(state, assign=assign)
    for name, layer in spectral_layers(fresh):
        assert torch.equal(dequantised(layer.weight), before[name])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_quantised_state_dict_does_not_fit_a_float_base(config, assign):
    state = quantize_base(adapted(), config).state_dict()
    with pytest.raises(RuntimeError, match=r"blocks\.0\.up\.weight: it is quantised"):
        adapted().load_state_dict(state, assign=assign)


@pytest.mark.parametrize("assign", [False, True])
def test_nor_the_bridge_s(assign):
    peft = pytest.importorskip("peft", reason="needs the extra peft")
    bridge = pytest.importorskip("fastspec.peft")
    model = peft.get_peft_model(Net(), bridge.SpectralConfig(r=4))
    quantised = quantised_plain(Net(), CONFIGS["int8"]).state_dict()
    state = model.state_dict()
    for name in state:
        plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
        state[name] = quantised.get(plain, state[name])
    with pytest.raises(RuntimeError, match=r"blocks\.0\.up\.base_layer\.weight: it is quantised"):
        model.load_state_dict(state, assign=assign)


def test_refusals():
    with pytest.raises(ValueError, match="no adapted"):
        quantize_base(Net(), CONFIGS["int8"])
    with pytest.raises(ValueError, match=r"blocks\.0\.up is merged"):
        quantize_base(fastspec.merge(adapted()), CONFIGS["int8"])
    model = quantize_base(adapted(), CONFIGS["int8"])
    with pytest.raises(ValueError, match="quantised already"):
        quantize_base(model, CONFIGS["int8"])
    with pytest.raises(ValueError, match=r"blocks\.0\.up: merging needs"):
        fastspec.merge(model)
    with pytest.raises(ValueError, match="making the factors again needs"):
        model.blocks[0].up.refactorize()
    assert "in_features=16, out_features=64" in repr(model)
    assert "Int8Tensor" in repr(model)
    with pytest.raises(ValueError, match=r"one of \('nf4', 'fp4'\), got 'int3'"):
        quantize_base(adapted(), "int3")
    fastspec.add_task(model, "a", current=True)
    with pytest.raises(ValueError, match="mixed batches of tasks needs"):
        model(IDS, tasks=["a", None])


def test_memory_table():
    net = Net(64)
    weights = sum(p.numel() for n, p in net.blocks.named_parameters() if p.dim() == 2)
    rows = {row["base"]: row for row in memory_table(net, SpectralConfig(rank=4))}
    got = [row["adapted weights"] / weights for row in rows.values()]
    # int8: a scale and a zero point an output row; int4: two float32 a group of 32
    # nf4: half a byte, and a float32 a block of 64
    expected = [4, 2, 1, 0.75, 0.5625][: len(got)]
    assert got == pytest.approx(expected, rel=0.1)
    singular_values = 4 * 4 * 4  # stay float32
    factors = rows["float32"]["factors"] - singular_values
    assert rows["int8"]["factors"] - singular_values == factors
    assert rows["bfloat16"]["factors"] - singular_values == factors / 2
    assert {row["coefficients"] for row in rows.values()} == {4 * 4 * 4}
    x = torch.zeros(3, 5)
    assert stored_bytes([x, x]) == 60


def test_memory_command(capsys):
    assert main(["memory", str(minilm_path()), "--rank", "8"]) == 0
    out = capsys.readouterr().out
    assert "int8" in out
    assert len(out.splitlines()) == 5 + (importlib.util.find_spec("bitsandbytes") is not None)
