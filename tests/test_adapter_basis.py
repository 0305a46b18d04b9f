"""Bases that are made again where an adapter is loaded: the same to rounding, refused, or brought along."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import assert_unchanged, frozen_state, minilm, rewrite, unpack
from tiny_models import IDS, gpt2, net, trained
from torch import nn

import fastspec
from fastspec import (
    SpectralConfig,
    add_task,
    list_tasks,
    load_adapter,
    load_tasks,
    save_adapter,
    spectralize,
)
from fastspec.cores import CORES, core_matrix, delta_shape, low_rank_storage, summed
from fastspec.files import ADAPTER_FILE as FILE
from fastspec.model.adapter_file import AdapterError
from fastspec.model.targets import spectral_layers
from fastspec.svd.factors import Directions, Factors, factorize
from fastspec.svd.sketch import TOLERANCE, distance, probed, sketch

X = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))


def tied(seed: int = 0) -> nn.Sequential:
    """An orthogonal weight, all of whose singular values are one, and an ordinary one."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    nn.init.orthogonal_(model[0].weight)
    return model.eval()


def shifted(model, config):
    spectralize(model, config)
    g = torch.Generator().manual_seed(3)
    for _, layer in spectral_layers(model):
        layer.delta.data.copy_(torch.randn(layer.delta.shape, generator=g))
    return model


@pytest.fixture
def elsewhere(monkeypatch):
    """Factors as another machine makes them: the same but for a rotation among tied singular values."""

    def rotated(weights, directions, names=None, progress=False):
        g = torch.Generator().manual_seed(4)
        made = []
        for f in factorize(weights, directions, names, progress):
            q = torch.eye(len(f.s))
            alike = (f.s[0] - f.s).abs() < 1e-4 * f.s[0]
            n = int(alike.sum())
            q[:n, :n] = torch.linalg.qr(torch.randn(n, n, generator=g))[0]
            made.append(Factors(f.u @ q, f.s, q.mT @ f.vh, f.singular) if n > 1 else f)
        return made

    def switch(on=True):
        monkeypatch.setattr("fastspec.model.convert.factorize", rotated if on else factorize)

    return switch


CONFIGS = [
    {"rank": 8},
    {"rank": 64},
    {"rank": 8, "core": "band", "half_width": 2},
    {"rank": 8, "core": "dense"},
    {"rank": 8, "core": "low_rank", "core_rank": 2},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_another_basis_among_tied_values_is_refused(tmp_path, elsewhere, options):
    config = SpectralConfig(**options)
    model = shifted(tied(), config)
    y = model(X)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(tied(), tmp_path)(X), y)
    elsewhere()
    adapted = spectralize(tied(), config)
    with torch.no_grad():
        for (_, layer), (_, own) in zip(
            spectral_layers(adapted), spectral_layers(model), strict=True
        ):
            layer.delta.copy_(own.delta)
        assert (adapted(X) - y).abs().max() > 0.3  # what would have been loaded
        for _, layer in spectral_layers(adapted):
            layer.delta.zero_()
    for other in (tied(), adapted):
        before = frozen_state(other, X)
        with pytest.raises(AdapterError, match=r"the basis of '0' here is another one.*bases=True"):
            load_adapter(other, tmp_path)
        assert_unchanged(other, before, X)
        with pytest.raises(AdapterError, match="the basis of '0' here is another one"):
            load_tasks(other, [tmp_path])
        assert list_tasks(other) == []


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_bases_brought_along_mean_the_same_anywhere(tmp_path, elsewhere, monkeypatch, options):
    config = SpectralConfig(**options)
    model = shifted(tied(), config)
    y = model(X)
    save_adapter(model, tmp_path / "a", bases=True)
    elsewhere()
    adapted = spectralize(tied(), config)
    assert torch.equal(load_adapter(adapted, tmp_path / "a")(X), y)

    def none(*args, **kwargs):
        raise AssertionError("nothing is to be factorised")

    monkeypatch.setattr("fastspec.model.convert.factorize", none)
    plain = load_adapter(tied(), tmp_path / "a")
    assert torch.equal(plain(X), y)
    for loaded in (adapted, plain):
        for (_, layer), (_, own) in zip(
            spectral_layers(loaded), spectral_layers(model), strict=True
        ):
            assert layer.singular_basis == own.singular_basis
            assert str(layer.plan(512)) == str(own.plan(512))
        save_adapter(loaded, tmp_path / "again", bases=True)
        assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "a" / FILE).read_bytes()


def test_kept_copies_are_made_again_for_brought_bases(tmp_path, elsewhere):
    config = SpectralConfig(rank=8)
    model = shifted(tied(), config)
    save_adapter(model, tmp_path, bases=True)
    elsewhere()
    other = fastspec.keep_merged(shifted(tied(), config))
    assert not torch.allclose(other(X), model(X))
    torch.testing.assert_close(load_adapter(other, tmp_path)(X), model(X))


def test_tasks_share_the_bases_that_a_folder_brings(tmp_path, elsewhere):
    config = SpectralConfig(rank=8, modules_to_save=[])
    model = shifted(tied(), config)
    save_adapter(model, tmp_path / "a", bases=True)
    ya = model(X)
    for _, layer in spectral_layers(model):
        layer.delta.data.neg_()
    save_adapter(model, tmp_path / "b")
    yb = model(X)
    elsewhere()
    served = tied()
    load_tasks(served, [tmp_path / "a", tmp_path / "b"])
    for name, y in (("a", ya), ("b", yb)):
        fastspec.set_task(served, name)
        assert torch.equal(served(X), y)
    # a model with tasks keeps its own bases
    own = spectralize(tied(), config)
    add_task(own, "first")
    u = own[0].u.clone()
    with pytest.raises(AdapterError, match="the basis of '0' here is another one"):
        add_task(own, "second", tmp_path / "a")
    with pytest.raises(AdapterError, match="the basis of '0' here is another one"):
        load_adapter(own, tmp_path / "a")
    assert torch.equal(own[0].u, u)
    assert list_tasks(own) == ["first"]


@pytest.mark.parametrize("basis", ["svd", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bases_of_other_kinds_and_dtypes(tmp_path, basis, dtype):
    def base():
        return gpt2().to(dtype)

    ids = torch.arange(16).reshape(2, 8)
    model = shifted(base(), SpectralConfig(rank=4, basis=basis))  # Conv1D, and tied embeddings
    for bases in (False, True):
        save_adapter(model, tmp_path, bases=bases)
        loaded = load_adapter(base(), tmp_path)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert [m.singular_basis for _, m in spectral_layers(loaded)] == [
            m.singular_basis for _, m in spectral_layers(model)
        ]


def test_layers_that_share_a_weight_share_what_is_brought(tmp_path):
    def base():
        model = net()
        model.blocks[1].up.weight = model.blocks[0].up.weight
        return model

    model = shifted(base(), SpectralConfig(rank=4))
    save_adapter(model, tmp_path, bases=True)
    loaded = load_adapter(base(), tmp_path)
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.blocks[0].up.u.data_ptr() == loaded.blocks[1].up.u.data_ptr()


def test_a_basis_of_the_trainers_own_needs_to_come_along(tmp_path):
    """Other directions than those of the weight, as a study puts them there."""

    def own_basis(model):
        for _, layer in spectral_layers(model):
            directions = Directions(layer.rank, basis="random", seed=7)
            layer._hold(factorize([layer.weight], [directions])[0])
        return model

    model = own_basis(shifted(net(), SpectralConfig(rank=4)))
    y = model(IDS)
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="or the adapter was trained in a basis of its own"):
        load_adapter(net(), tmp_path)
    assert torch.equal(
        load_adapter(own_basis(spectralize(net(), SpectralConfig(rank=4))), tmp_path)(IDS), y
    )
    save_adapter(model, tmp_path, bases=True)
    loaded = load_adapter(net(), tmp_path)
    torch.testing.assert_close(loaded(IDS), y)
    assert not any(layer.singular_basis for _, layer in spectral_layers(loaded)), (
        "W V = U S is untrue"
    )


def test_what_a_folder_says_of_its_bases_is_checked(tmp_path):
    save_adapter(trained(), tmp_path, bases=True)
    good = (tmp_path / FILE).read_bytes()
    for change, said in (
        (lambda t: t.pop("blocks.0.up.u"), r"lacks blocks\.0\.up\.u"),
        (lambda t: t.update({"blocks.0.up.u": torch.zeros(64, 5)}), r"up\.u is \[64, 5\]"),
        (lambda t: t["blocks.0.up.vh"].fill_(float("nan")), r"up\.vh holds NaN"),
        (lambda t: t.pop("update_sketch"), "lacks update_sketch"),
        (lambda t: t["blocks.0.up.u"].neg_(), "the basis of 'blocks.0.up' here is another"),
    ):
        (tmp_path / FILE).write_bytes(good)
        rewrite(tmp_path, change)
        model = net()
        before = frozen_state(model, IDS)
        with pytest.raises(AdapterError, match=said):
            load_adapter(model, tmp_path)
        assert_unchanged(model, before, IDS)


# --------------------------------------------------------------------------------------- the sketch


@pytest.mark.parametrize("core", ["diag", "band", "dense"])
def test_a_sketch_measures_the_distance_of_updates(core):
    g = torch.Generator().manual_seed(0)

    def orthonormal(n, k):
        return torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0]

    ratios = []
    for trial in range(40):
        k, turned = 16, 2 + trial % 3
        u, vh = orthonormal(90, k), orthonormal(70, k).mT
        q = torch.eye(k, dtype=torch.float64)
        q[:turned, :turned] = orthonormal(turned, turned)
        delta = torch.randn(delta_shape(core, k), generator=g)
        c = core_matrix(delta.double(), core)
        moved_u, moved_vh = u @ q, q.mT @ vh
        off = (u @ c @ vh - moved_u @ c @ moved_vh).norm() / c.norm()
        here = sketch(probed(moved_u, moved_vh), delta, core)
        there = sketch(probed(u, vh), delta, core)
        if off > 0.01:
            ratios.append(float(distance(here, there) / off))
    assert len(ratios) > 20
    assert 0.2 < min(ratios) < max(ratios) < 3


def test_a_sketch_does_not_mind_scales_nor_signs_nor_nothing():
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(30, 6, generator=g))[0] for _ in range(2))
    delta = torch.randn(6, generator=g)
    plain = sketch(probed(u, v.mT), delta, "diag")
    flipped = sketch(probed(-u, -v.mT), delta, "diag")
    assert torch.equal(plain, flipped)
    for scale in (1e-38, 1e38):
        assert distance(sketch(probed(u, v.mT), scale * delta, "diag"), plain) < 1e-5
    assert not sketch(probed(u, v.mT), torch.zeros(6), "diag").any()


@pytest.mark.parametrize("core", CORES)
def test_autocast_leaves_a_sketch_as_it_is(core):
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(90, 16, generator=g))[0] for _ in range(2))
    delta = torch.randn(delta_shape(core, 16), generator=g)
    plain = sketch(probed(u, v.mT), delta, core)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sketch(probed(u, v.mT), delta, core), plain)


@pytest.mark.parametrize("apart", [0.0, 1e-7, 1e-6, 1e-4, 1e-2])
def test_a_sketch_of_a_difference_has_digits(apart):
    """The outer products of a low-rank core cancel, in a difference of adapters all but entirely."""
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(90, 16, generator=g))[0] for _ in range(2))
    a, noise = torch.randn(2, 4, 16, generator=g) / 20
    delta = summed([a * (1 + 20 * apart * noise), a], [1.0, -1.0], "low_rank")
    here = sketch(probed(u, v.mT), delta, "low_rank")
    c = core_matrix(delta.double(), "low_rank")
    assert distance(here, sketch(probed(u.double(), v.double().mT), c, "dense")) < 1e-5
    elsewhere = u + 1e-6 * torch.randn(u.shape, generator=g)
    assert distance(here, sketch(probed(elsewhere, v.mT), delta, "low_rank")) < 1e-4
    left, right = a.double().chunk(2)
    nothing = low_rank_storage(torch.cat([left, -left]), torch.cat([right, right]))
    assert sketch(probed(u, v.mT), nothing, "low_rank").abs().max() < TOLERANCE


def test_the_probes_are_these():
    """Another version must find them again."""
    from fastspec.svd.sketch import _signs

    assert _signs(3, "in").tolist() == [
        [-1, 1, -1, 1, -1, 1, 1, 1],
        [-1, -1, -1, 1, 1, -1, -1, 1],
        [-1, 1, -1, 1, -1, -1, -1, 1],
    ]
    assert _signs(1, "out").tolist() == [[-1, 1, 1, -1, 1, -1, -1, 1]]


SCRIPT = """
import sys, torch, fastspec
torch.set_num_threads(int(sys.argv[1]))
sys.path.insert(0, sys.argv[2])
from test_adapter_basis import X, tied
from support import minilm
model, folder = tied() if sys.argv[4] == "tied" else minilm(), sys.argv[3]
if sys.argv[4] == "tied":
    model.load_state_dict(torch.load(folder + "/../base.pt"))
try:
    fastspec.load_adapter(model, folder, strict=False)
except fastspec.model.adapter_file.AdapterError as e:
    print("refused", e)
else:
    x = X if sys.argv[4] == "tied" else torch.arange(40).reshape(2, 20) + 1000
    y = model(x) if sys.argv[4] == "tied" else model(x).logits
    print("loaded", repr(y.detach().double().sum().item()))
"""


def loaded_with(threads, folder, kind):
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(threads), str(here), str(folder), kind],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return run.stdout.strip().splitlines()[-1]


def test_threads(tmp_path):
    """Saved with one thread and loaded with several, in processes of their own."""
    former = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        model = tied()  # orthogonal by QR, whose digits depend on threads too
        torch.save(model.state_dict(), tmp_path / "base.pt")
        shifted(model, SpectralConfig(rank=32))
    finally:
        torch.set_num_threads(former)
    y = model(X).detach()
    save_adapter(model, tmp_path / "made")
    save_adapter(model, tmp_path / "brought", bases=True)
    for threads in (1, 4):
        answer, _, value = loaded_with(threads, tmp_path / "brought", "tied").partition(" ")
        assert answer == "loaded"
        assert abs(float(value) - float(y.double().sum())) < 1e-3
        answer, _, value = loaded_with(threads, tmp_path / "made", "tied").partition(" ")
        if answer == "loaded":  # then it is right
            assert abs(float(value) - float(y.double().sum())) < 1e-3
        else:
            assert "the basis of '0' here is another one" in value


def test_a_pretrained_encoder_loads_with_any_threads(tmp_path):
    """Rounding is no other basis: far below the tolerance, also at full rank and in 16 bits."""
    model = shifted(minilm(), SpectralConfig(rank=32))
    save_adapter(model, tmp_path)
    for threads in (1, 4):
        assert loaded_with(threads, tmp_path, "minilm").startswith("loaded")
    assert (tmp_path / FILE).stat().st_size < 60_000
    worst = 0.0
    for _, layer in spectral_layers(model):
        # another start block and a looser tolerance: another way to the same vectors
        directions = Directions(layer.rank, tol=1e-4, seed=1)
        f = factorize([layer.weight], [directions])[0]
        here = sketch(probed(f.u, f.vh), layer.delta, "diag")
        there = sketch(probed(layer.u, layer.vh), layer.delta, "diag")
        worst = max(worst, float(distance(here, there)))
    assert 0 < worst < TOLERANCE / 10


def test_copies_keep_their_bases(tmp_path, elsewhere):
    model = copy.deepcopy(shifted(tied(), SpectralConfig(rank=8)))
    save_adapter(model, tmp_path, bases=True)
    elsewhere()
    assert torch.equal(load_adapter(tied(), tmp_path)(X), model(X))
    assert unpack((tmp_path / FILE).read_bytes())[1]["bases"] is True
