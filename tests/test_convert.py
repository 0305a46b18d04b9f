"""`spectralize` on whole models: what is adapted, what is trained, what is refused."""

import copy
import warnings

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from support import assert_close, minilm
from tiny_models import IDS, Net
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastspec
from fastspec import SpectralConfig, SpectralLinear, spectralize
from fastspec.cli import main
from fastspec.cores import CORES
from fastspec.model.targets import spectral_layers


@pytest.fixture
def net():
    return tiny_models.net()


def names(model):
    return [n for n, _ in spectral_layers(model)]


def test_default_adapts_every_linear_but_the_head(net):
    y = net(IDS)
    assert spectralize(net, SpectralConfig(rank=4)) is net
    assert names(net) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert torch.equal(net(IDS), y)
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    assert trained == [f"{n}.delta" for n in names(net)] + ["head.weight", "head.bias"]
    assert net.spectral.modules_to_save == ("head",)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"target_modules": ["up"]}, ["blocks.0.up", "blocks.1.up"]),
        ({"target_modules": ["blocks.0.up", "down"]}, ["blocks.0.up", "blocks.0.down", "blocks.1.down"]),
        ({"target_modules": r"blocks\.1\..*"}, ["blocks.1.up", "blocks.1.down"]),
        ({"exclude_modules": ["up"]}, ["blocks.0.down", "blocks.1.down"]),
        ({"exclude_modules": r".*\.1\..*"}, ["blocks.0.up", "blocks.0.down"]),
        ({"rank": {"up": 3, "down": 2}}, ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]),
        ({"rank": {r"\.0\.": 3}}, ["blocks.0.up", "blocks.0.down"]),
    ],
)  # fmt: skip
def test_targets(net, config, expected):
    spectralize(net, SpectralConfig(**{"rank": 4, **config}))
    assert names(net) == expected


@pytest.mark.parametrize(
    ("rank", "k"), [(5, 5), (0.25, 4), (0.01, 1), (1.0, 16), ("full", 16), ({"up": 3, "default": "full"}, 3)]
)  # fmt: skip
def test_ranks(net, rank, k):
    spectralize(net, SpectralConfig(rank=rank))
    assert net.blocks[0].up.rank == k


def test_select_range_sets_the_rank(net):
    spectralize(net, SpectralConfig(select=(2, 9)))
    assert net.blocks[0].up.rank == 7
    assert_close(net.blocks[0].up.s, torch.linalg.svdvals(net.blocks[0].up.weight.detach())[2:9])


def test_biases_and_norms(net):
    spectralize(net, SpectralConfig(rank=2, train_bias=True, train_layernorm=True))
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {"blocks.0.up.bias", "blocks.1.norm.weight", "blocks.1.norm.bias"} <= trained
    assert "embed.weight" not in trained
    assert "blocks.0.up.weight" not in trained


def test_modules_to_save_overrides_the_heads(net):
    spectralize(net, SpectralConfig(rank=2, modules_to_save=["blocks.1.down"]))
    assert net.blocks[1].down.weight.requires_grad
    assert type(net.blocks[1].down) is nn.Linear
    assert not any(p.requires_grad for p in net.head.parameters())
    assert type(net.head) is nn.Linear, "a head stays plain even where it is not trained"


def test_tied_weights_share_one_factorisation(net):
    net.blocks[1].up.weight = net.blocks[0].up.weight
    spectralize(net, SpectralConfig(rank=4))
    a, b = net.blocks[0].up, net.blocks[1].up
    assert a.weight is b.weight
    assert a.u is b.u
    assert a.vh is b.vh
    assert a.delta is not b.delta
    y, base = net(IDS), a.weight.clone()
    a.delta.data.fill_(0.3)
    fastspec.merge(net)
    assert torch.equal(b.weight, base), "merging one layer must not move the other"
    fastspec.unmerge(net)
    assert a.weight is b.weight
    a.delta.data.zero_()
    assert torch.equal(net(IDS), y)


def test_a_module_used_twice_stays_one_module(net):
    net.blocks[1].up = net.blocks[0].up
    spectralize(net, SpectralConfig(rank=4))
    assert net.blocks[0].up is net.blocks[1].up
    assert isinstance(net.blocks[1].up, SpectralLinear)


def test_a_plain_models_state_loads(net):
    state, y = copy.deepcopy(net.state_dict()), net(IDS)
    spectralize(net, SpectralConfig(rank=4))
    for _, layer in spectral_layers(net):
        layer.delta.data.fill_(0.1)
    assert net.load_state_dict(state) == ([], [])
    assert torch.equal(net(IDS), y)


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        ({"rank": 4}, {"rank": 4, "select": "trailing"}),
        ({"select": (0, 4)}, {"select": (1, 5)}),
        ({"rank": 4}, {"rank": 4, "basis": "random"}),
        ({"rank": 4, "basis": "random"}, {"rank": 4, "basis": "random", "seed": 1}),
        ({"rank": 3, "core": "dense"}, {"rank": 3, "core": "band"}),
    ],
)
def test_a_state_dict_of_other_directions_is_refused(net, saved, loading, tmp_path):
    model = spectralize(copy.deepcopy(net), SpectralConfig(**saved))
    with torch.no_grad():
        for _, layer in spectral_layers(model):
            layer.delta.fill_(0.1)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = spectralize(copy.deepcopy(net), SpectralConfig(**loading))
    before = other(IDS)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.up\.delta: .* mean another update"):
        other.load_state_dict(state)
    assert torch.equal(other(IDS), before)
    alike = spectralize(net, SpectralConfig(**saved))
    alike.load_state_dict(state)
    assert torch.equal(alike(IDS), model(IDS))
    alike.load_state_dict(dict(state))  # of tensors alone
    assert torch.equal(alike(IDS), model(IDS))


def test_the_same_directions_by_another_name_load(net):
    state = spectralize(copy.deepcopy(net), SpectralConfig(rank=16, seed=3)).state_dict()
    spectralize(net, SpectralConfig(select=(0, 16))).load_state_dict(state)


def test_counts_and_printing(net, capsys):
    total = sum(p.numel() for p in net.parameters())
    spectralize(net, SpectralConfig(rank=4))
    counts = fastspec.trainable_parameters(net)
    assert counts == {"adapter": 16, "head": 16 * 3 + 3, "total": total + 16}
    fastspec.merge(net)
    assert fastspec.trainable_parameters(net) == counts
    fastspec.print_trainable_parameters(net)
    out = capsys.readouterr().out
    assert "16" in out
    assert f"{100 * 16 / (total + 16):.4f} %" in out
    assert f"{total + 16:,}" in out


def test_merge_of_a_model_is_all_or_nothing(net):
    spectralize(net, SpectralConfig(rank=4))
    net.blocks[1].down.delta.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"blocks\.1\.down: .*not finite"):
        fastspec.merge(net)
    assert not any(layer.merged for _, layer in spectral_layers(net))


def broken(change):
    torch.manual_seed(0)
    net = Net()
    change(net)
    return net


def set_nan(net):
    net.blocks[1].up.weight.data[3, 3] = float("nan")


def to_meta(net):
    net.blocks[1].up.to("meta")


def to_int8(net):
    w = torch.zeros(64, 16, dtype=torch.int8)
    net.blocks[1].up.weight = nn.Parameter(w, requires_grad=False)


def to_inference(net):
    with torch.inference_mode():
        net.head = nn.Linear(16, 3)


@pytest.mark.parametrize(
    ("change", "config", "error", "message"),
    [
        (set_nan, {"rank": 2}, ValueError, r"blocks\.1\.up.*(finite|NaN)"),
        (set_nan, {"rank": 2, "basis": "random"}, ValueError, r"blocks\.1\.up.*finite"),
        (to_meta, {"rank": 2}, ValueError, r"blocks\.1\.up: .*meta device"),
        (to_int8, {"rank": 2}, TypeError, r"blocks\.1\.up: .*quantised.*int8"),
        (None, {"rank": 17}, ValueError, r"blocks\.0\.up: rank 17 is above min\(in, out\) = 16"),
        (None, {"select": (10, 18)}, ValueError, r"blocks\.0\.up: .*18.*16"),
        (
            None,
            {"target_modules": ["query"]},
            ValueError,
            r"target_modules names 'query', which is no linear layer.*blocks\.0\.up",
        ),
        (None, {"modules_to_save": ["pooler"]}, ValueError, "pooler"),
        (
            None,
            {"rank": 2, "target_modules": ["up", "head"]},
            ValueError,
            r"names 'head', which is a head",
        ),
        (None, {"exclude_modules": "down"}, ValueError, r"names go in a list: \['down'\]"),
        (None, {"exclude_modules": r".*\.donw"}, ValueError, "exclude_modules=.*donw"),
        (to_inference, {"rank": 2}, ValueError, r"head\.weight was made under .*inference_mode"),
    ],
)
def test_refusals_leave_the_model_unchanged(change, config, error, message):
    net = broken(change or (lambda net: None))
    before = repr(net)
    flags = [p.requires_grad for p in net.parameters()]
    with pytest.raises(error, match=message):
        spectralize(net, SpectralConfig(**config))
    assert repr(net) == before
    assert [p.requires_grad for p in net.parameters()] == flags
    assert not hasattr(net, "spectral")


def test_twice_is_refused(net):
    spectralize(net, SpectralConfig(rank=2))
    u = net.blocks[0].up.u
    with pytest.raises(ValueError, match=r"adapted already.*blocks\.0\.up"):
        spectralize(net, SpectralConfig(rank=4))
    assert net.blocks[0].up.u is u


def test_a_single_linear_is_pointed_to_from_linear():
    with pytest.raises(TypeError, match="from_linear"):
        spectralize(nn.Linear(4, 4))


def test_a_subclass_with_its_own_forward_is_named(net):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net.blocks[0].up = Scaled(16, 64)
    with pytest.raises(TypeError, match=r"blocks\.0\.up: Scaled.*exclude_modules"):
        spectralize(net, SpectralConfig(rank=2))
    spectralize(net, SpectralConfig(rank=2, exclude_modules=["blocks.0.up"]))


def test_torch_transformer_layers_see_the_coefficients_in_inference_too():
    """Torch's fused inference path would read the weights past the layer's forward."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    spectralize(model, SpectralConfig(rank=4))
    assert names(model) == [
        "layers.0.linear1",
        "layers.0.linear2",
        "layers.1.linear1",
        "layers.1.linear2",
    ]
    for _, layer in spectral_layers(model):
        layer.delta.data.fill_(0.5)
    y = model(x)
    for p in model.parameters():
        p.requires_grad_(False)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    with torch.no_grad():
        assert_close(model(x), y)
        assert_close(model(x, src_key_padding_mask=mask), y)
    with pytest.raises(ValueError, match=r"out_proj: nn.MultiheadAttention"):
        spectralize(copy.deepcopy(Attention()), SpectralConfig(rank=2, target_modules=["out_proj"]))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize("names", [r".*(down|gate_up_proj)", ["down", "up_proj"]])
def test_stacks_that_are_meant_and_left_plain_are_named(names):
    net = Net()
    net.blocks[0].experts = nn.Module()
    net.blocks[0].experts.gate_up_proj = nn.Parameter(torch.randn(2, 8, 8))
    net.blocks[1].up_proj = nn.Linear(16, 16)
    match = r"such as blocks\.0\.experts\.gate_up_proj, which no nn\.Linear holds"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectralize(copy.deepcopy(net), SpectralConfig(rank=2, target_modules=["down"]))
    with pytest.warns(UserWarning, match=match):
        spectralize(net, SpectralConfig(rank=2, target_modules=names))


def test_what_is_merged_or_loaded_under_inference_mode_can_be_trained(net, tmp_path):
    base = copy.deepcopy(net)
    fastspec.save_adapter(spectralize(copy.deepcopy(net), SpectralConfig(rank=4)), tmp_path / "a")
    with torch.inference_mode():
        fastspec.load_tasks(net, [tmp_path / "a"])
        fastspec.set_task(net, "a")
        net(IDS)
    net(IDS).sum().backward()
    plain = fastspec.load_adapter(base, tmp_path / "a")
    with torch.inference_mode():
        fastspec.merge_and_unload(plain)
        plain(IDS)
    plain.requires_grad_(True)(IDS).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


@pytest.mark.parametrize("loads", [False, True])
def test_what_is_made_under_inference_mode_can_be_trained(net, loads, tmp_path):
    base = copy.deepcopy(net)
    fastspec.save_adapter(spectralize(net, SpectralConfig(rank=4)), tmp_path)
    with torch.inference_mode():
        if loads:
            fastspec.load_adapter(base, tmp_path)
        else:
            spectralize(base, SpectralConfig(rank=4))
        base(IDS)
    base(IDS).sum().backward()
    torch.optim.SGD([p for p in base.parameters() if p.requires_grad], lr=0.1).step()
    assert all(bool(layer.delta.any()) for _, layer in spectral_layers(base))


def test_progress_is_silent_for_small_models(net, capsys):
    spectralize(net, SpectralConfig(rank=2))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("core", CORES)
def test_compiles_whole_and_once(net, core):
    spectralize(net, SpectralConfig(rank=4, core=core))
    trained = [p for p in net.parameters() if p.requires_grad]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for _ in range(3):
        for _, layer in spectral_layers(net):
            layer.delta.data.add_(0.1)
        got = torch.autograd.grad(compiled(IDS).square().sum(), trained)
        want = torch.autograd.grad(net(IDS).square().sum(), trained)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)
    assert counter.frame_count == 1, "changed coefficients must not compile again"


class TestBasisFiles:
    @pytest.fixture
    def basis(self, tmp_path):
        folder = tmp_path / "net"
        folder.mkdir()
        torch.manual_seed(0)
        save_file(Net().state_dict(), folder / "model.safetensors")
        path = tmp_path / "basis.safetensors"
        assert main(["factorize", str(folder), "--rank", "8", "-o", str(path)]) == 0
        return path

    @pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 3}, {"select": (2, 7)}])
    def test_gives_what_factorising_gives(self, net, basis, options, monkeypatch):
        expected = spectralize(copy.deepcopy(net), SpectralConfig(**options))
        monkeypatch.setattr(
            "fastspec.model.convert.factorize", lambda *a, **k: pytest.fail("factorised")
        )
        spectralize(net, SpectralConfig(**options), basis=basis)
        for (_, a), (_, b) in zip(spectral_layers(net), spectral_layers(expected), strict=True):
            assert_close(a.u @ a.s.diag() @ a.vh, b.u @ b.s.diag() @ b.vh)
            assert a.singular_basis

    def test_refusals_leave_the_model_unchanged(self, net, basis):
        before = repr(net)
        with pytest.raises(ValueError, match=r"blocks\.0\.up: .* holds 8 triplets"):
            spectralize(net, SpectralConfig(rank=9), basis=basis)
        with pytest.raises(ValueError, match="singular vectors"):
            spectralize(net, SpectralConfig(rank=4, basis="random"), basis=basis)
        net.blocks[1].up.weight.data[0, 0] += 1
        with pytest.raises(ValueError, match=r"blocks\.1\.up: .*other weights"):
            spectralize(net, SpectralConfig(rank=4), basis=basis)
        assert repr(net) == before


class TestHuggingFace:
    def test_minilm(self):
        model = minilm(num_labels=3)
        ids = torch.randint(0, 30000, (3, 11), generator=torch.Generator().manual_seed(0))
        y = model(ids).logits
        spectralize(model, SpectralConfig(rank=32))
        assert torch.equal(model(ids).logits, y)
        assert model.spectral.modules_to_save == ("classifier",)
        assert len(names(model)) == 6 * 6 + 1
        assert fastspec.trainable_parameters(model)["adapter"] == 37 * 32

    def test_gpt2_conv1d_and_tied_output_layer(self):
        model = tiny_models.gpt2(n_embd=32)
        ids = torch.arange(12).reshape(2, 6)
        y = model(ids).logits
        spectralize(model, SpectralConfig(rank=8))
        assert torch.equal(model(ids).logits, y)
        assert model.spectral.modules_to_save == ()
        assert len(names(model)) == 8
        assert type(model.transformer.h[0].attn.c_attn) is fastspec.SpectralConv1D
        assert model.lm_head.weight is model.transformer.wte.weight
        assert type(model.lm_head) is nn.Linear
        model(ids, labels=ids).loss.backward()
        assert all(layer.delta.grad.abs().sum() > 0 for _, layer in spectral_layers(model))
