"""What `fastspec analyze` measures on weights whose answers are known."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import fastspec
from fastspec import SpectralConfig
from fastspec.cli import main
from fastspec.model.targets import spectral_layers
from fastspec.studies.analyze import tables
from fastspec.studies.analyze.alignment import align, clusters, rank_ranges
from fastspec.studies.analyze.gradients import CumulativeGradients, spectra
from fastspec.studies.analyze.ranks import allocate, coefficient_energy, patterns
from fastspec.studies.analyze.stability import RunAlignment, generalisation, holm, within_groups
from fastspec.studies.analyze.transplant import Matrices, mask, swap
from fastspec.studies.analyze.weights import Pair, kind_of, layer_of, load_weights, pairs


def orthonormal(m, k, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]


def matrix(s, m, n, seed=0):
    """(W, U, V) with the singular values `s`."""
    s = torch.as_tensor(s, dtype=torch.float64)
    u, v = orthonormal(m, len(s), seed), orthonormal(n, len(s), seed + 1)
    return (u * s) @ v.mT, u, v


def pair(before, after):
    return Pair("layer.3.attention.weight", "attention", 3, before, after)


def test_moving_coefficients_alone_moves_no_vector():
    s = torch.linspace(9, 1, 12).double()
    w, u, v = matrix(s, 20, 12)
    shift = 0.05 * torch.ones(12).double()
    (a,) = align([pair(w, w + (u * shift) @ v.mT)])
    for cosines in (a.left, a.right, a.joint, a.cluster_left, a.overlap_left, a.overlap_right):
        torch.testing.assert_close(cosines, torch.ones(12).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(a.s_after - a.s, shift)
    torch.testing.assert_close(a.update_diagonal, shift)
    # the update lies in the basis: r of its 12 equal parts in the leading r directions
    torch.testing.assert_close(a.update_captured, torch.arange(1, 13).double() / 12)
    assert a.summary()["s1(dW)/s1(W)"] == pytest.approx(0.05 / 9)
    assert a.summary()["norm of dW over W"] == pytest.approx(0.05 * 12**0.5 / s.norm().item())
    assert a.summary()["dW on the diagonal"] == pytest.approx(1)
    assert a.summary()["dW in 8 directions of its own"] == pytest.approx(8 / 12)


def test_a_rotation_inside_a_cluster_is_told_from_one_outside():
    s = [10.0, 5.0, 5.0 * (1 - 1e-4), 2.0, 1.0]
    w, u, v = matrix(s, 8, 6)
    angle = 0.7
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    ).double()

    def rotated(i, j):
        new_u, new_v = u.clone(), v.clone()
        new_u[:, [i, j]] = u[:, [i, j]] @ turn
        new_v[:, [i, j]] = v[:, [i, j]] @ turn
        return (new_u * torch.tensor(s).double()) @ new_v.mT

    inside, outside = align([pair(w, rotated(1, 2)), pair(w, rotated(0, 3))])
    assert inside.cluster.tolist() == [0, 1, 1, 2, 3, 4]  # the sixth value is zero
    # matched vectors have rotated, their span has not: that rotation changes W by 1e-4 only
    torch.testing.assert_close(
        inside.left[1:3], torch.full((2,), math.cos(angle)).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(inside.cluster_left[1:3], torch.ones(2).double())
    assert inside.overlap_left[2].item() == pytest.approx(1)
    assert inside.overlap_left[1].item() == pytest.approx((1 + math.cos(angle) ** 2) / 2, abs=1e-6)
    assert outside.cluster_left[0].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert outside.overlap_left[0].item() == pytest.approx(math.cos(angle) ** 2, abs=1e-6)


def test_signs_of_vectors_do_not_matter():
    w, u, v = matrix([4.0, 2.0, 1.0], 5, 3)
    flipped = (-u * torch.tensor([4.0, 2.0, 1.0]).double()) @ (-v).mT
    (a,) = align([pair(w, flipped)])
    torch.testing.assert_close(a.joint, torch.ones(3).double(), atol=1e-9, rtol=0)


def test_unrelated_matrices_are_aligned_by_chance():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 200, 200, generator=g)
    (found,) = align([pair(a, b)])
    assert found.left.mean().item() == pytest.approx((2 / (math.pi * 200)) ** 0.5, rel=0.15)
    matched, spans, chance = found.blocks.mean(0).tolist()
    assert chance == pytest.approx((20 / 200) ** 0.5)
    assert spans == pytest.approx(chance, rel=0.05)
    assert matched < 0.1
    (noisy,) = align([pair(a, a + 0.1 * b)])
    line = noisy.summary()
    assert line["dW there by chance"] == pytest.approx(0.01)
    assert line["dW in leading tenth"] == pytest.approx(0.01, abs=0.003)
    assert line["dW on it by chance"] == pytest.approx(1 / 200)
    assert line["dW on the diagonal"] == pytest.approx(1 / 200, rel=0.4)


def test_an_update_of_zero_and_bad_arguments():
    w = torch.randn(6, 4)
    (a,) = align([pair(w, w.clone())])
    assert a.update_captured.tolist() == [0.0] * 4
    assert a.summary()["dW on the diagonal"] == 0
    assert a.left.min() > 0.9999
    with pytest.raises(ValueError, match=r"attention\.weight is zero in the first checkpoint"):
        align([pair(torch.zeros(6, 4), w)])
    with pytest.raises(ValueError, match="gap is a share"):
        align([pair(w, w)], gap=1.5)


def test_clusters_and_ranges():
    s = torch.tensor([10.0, 9.95, 5.0, 4.0, 3.99, 3.98])
    assert clusters(s, 0.01).tolist() == [0, 0, 1, 2, 2, 2]
    assert clusters(s, 0.0).tolist() == [0, 1, 2, 3, 4, 5]
    assert rank_ranges(3) == [(0, 1), (1, 2), (2, 3)]
    assert rank_ranges(25)[0][0] == 0
    assert rank_ranges(25)[-1][1] == 25
    assert len(rank_ranges(25)) == 10


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention", 0),
        ("bert.encoder.layer.0.output.dense.weight", "mlp", 0),
        ("bert.encoder.layer.11.intermediate.dense.weight", "mlp", 11),
        ("model.layers.3.self_attn.q_proj.weight", "attention", 3),
        ("model.layers.3.mlp.gate_proj.weight", "mlp", 3),
        ("transformer.h.1.attn.c_proj.weight", "attention", 1),
        ("transformer.h.1.mlp.c_proj.weight", "mlp", 1),
        ("encoder.layers.0.self_attn.in_proj_weight", "attention", 0),
        ("encoder.layers.0.linear1.weight", "mlp", 0),
        ("encoder.layers.encoder_layer_5.mlp.0.weight", "mlp", 5),
        ("encoder.layers.encoder_layer_10.self_attention.in_proj_weight", "attention", 10),
        ("layer4.0.conv1.weight", "other", 4),
        ("features.denseblock2.denselayer11.conv1.weight", "other", 2),
        ("blocks.7.mlp.fc1.weight", "mlp", 7),
        ("conv1.weight", "other", None),
        ("pooler.dense.weight", "other", None),
    ],
)
def test_kinds_and_layers(name, kind, layer):
    assert (kind_of(name), layer_of(name)) == (kind, layer)


def test_checkpoints_are_read_and_paired(tmp_path):
    g = torch.Generator().manual_seed(0)
    state = {
        "bert.layer.0.query.weight": torch.randn(6, 6, generator=g),
        "bert.conv.weight": torch.randn(4, 3, 2, 2, generator=g),
        "bert.embeddings.weight": torch.randn(9, 6, generator=g),
        "bert.layer.0.bias": torch.randn(6, generator=g),
        "steps": torch.tensor(3),
    }
    save_file(state, tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "b.pt")
    a, b = load_weights(tmp_path), load_weights(tmp_path / "b.pt")
    found = pairs(a, b)
    assert {(p.name, tuple(p.before.shape), p.layer) for p in found} == {
        ("bert.layer.0.query.weight", (6, 6), 0),
        ("bert.conv.weight", (4, 12), None),
    }
    # an encoder on its own against a classifier that holds it
    encoder = {k.removeprefix("bert."): v for k, v in state.items()}
    assert len(pairs(encoder, state)) == len(pairs(state, encoder)) == 2
    assert [p.name for p in pairs(a, b, include="query")] == ["bert.layer.0.query.weight"]
    assert len(pairs(a, b, exclude="")) == 3
    with pytest.raises(ValueError, match="have no matrix in common"):
        pairs(a, {"other.weight": torch.randn(3, 3)})
    with pytest.raises(ValueError, match=r"shape \[6, 6\] in one, \[6, 5\] in the other"):
        pairs({"q.weight": torch.ones(6, 6)}, {"q.weight": torch.ones(6, 5)})
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        pairs({"q.weight": torch.ones(2, 2)}, {"q.weight": torch.full((2, 2), torch.nan)})
    with pytest.raises(ValueError, match="no such file, or a folder without weights"):
        load_weights(tmp_path / "nothing")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(tmp_path / "bad.safetensors")


def test_the_command_compares_two_files_and_draws(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    names = ["query", "key", "mlp.up_proj"]
    before = {
        f"layer.{i}.{n}.weight": torch.randn(24, 12, generator=g) for i in range(2) for n in names
    }
    after = {n: w + 0.05 * torch.randn(24, 12, generator=g) for n, w in before.items()}
    save_file(before, tmp_path / "a.safetensors")
    save_file(after, tmp_path / "b.safetensors")
    base = ["analyze", "weights", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main([*base, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "| layer.1.mlp.up_proj | mlp | 1 | 24 x 12 |" in out
    header, rule, *body = (tmp_path / "out" / "matrices.md").read_text().splitlines()
    assert len({line.count("|") for line in (header, rule, *body)}) == 1
    matrices = list(csv.DictReader((tmp_path / "out" / "matrices.csv").open()))
    means = list(csv.DictReader((tmp_path / "out" / "kinds.csv").open()))
    assert (tmp_path / "out" / "kinds.md").read_text() in out
    assert list(means[0]) == ["mean over matrices", "attention", "mlp"]
    assert [line["attention"] for line in means if line["mean over matrices"] == "matrices"] == [
        "4"
    ]
    for line in means[1:]:
        for kind in ("attention", "mlp"):
            values = [float(m[line["mean over matrices"]]) for m in matrices if m["kind"] == kind]
            assert float(line[kind]) == pytest.approx(sum(values) / len(values)), line
    assert "cosine, leading tenth" in {line["mean over matrices"] for line in means}
    lines = list(csv.DictReader((tmp_path / "out" / "vectors.csv").open()))
    assert len(lines) == 6 * 12
    assert 0 <= float(lines[0]["left cosine"]) <= 1
    for picture in ("alignment", "profile", "update"):
        assert (tmp_path / "out" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert main([*base[:-1], "-o", str(tmp_path / "out")]) == 2  # one file that is no run
    assert "a.safetensors" in capsys.readouterr().err


WAYS = ("pretrained", "pretrained spans", "random", "random spans", "zero")


class Two(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.attention = torch.nn.Linear(*w.shape[::-1], bias=False)
        self.attention.weight = torch.nn.Parameter(w.clone(), requires_grad=False)


def test_swaps_and_masks_change_what_they_should_and_nothing_afterwards():
    w, u, v = (t.float() for t in matrix([8.0, 4.0, 2.0, 1.0], 6, 4))
    other, p, q = (t.float() for t in matrix([3.0, 2.0, 1.0, 0.5], 6, 4, seed=7))
    model = Two(w)
    seen = []

    def score(m):
        seen.append(m.attention.weight.clone())
        return float(m.attention.weight.norm())

    scored = list(
        swap(model, score, {"pretrained": {"attention.weight": other}}, shares=[0.5, 1.0])
    )
    assert [(s.what, s.share) for s in scored] == [
        ("own", 0.0),
        *((what, share) for what in WAYS for share in (0.5, 1.0)),
    ]
    s = torch.tensor([8.0, 4.0, 2.0, 1.0])
    torch.testing.assert_close(seen[0], w)
    half = (p[:, :2] * s[:2]) @ q[:, :2].mT + (u[:, 2:] * s[2:]) @ v[:, 2:].mT
    torch.testing.assert_close(seen[1], half, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[2], (p * s) @ q.mT, atol=1e-5, rtol=0)
    # the leading half as far as it lies in the other leading spans
    part = (u[:, :2] * s[:2]) @ v[:, :2].mT
    inside = p[:, :2] @ p[:, :2].mT @ part @ q[:, :2] @ q[:, :2].mT
    torch.testing.assert_close(seen[3], w - part + inside, atol=1e-5, rtol=0)
    # random vectors are orthonormal: with all of them the singular values stay
    torch.testing.assert_close(torch.linalg.svdvals(seen[6]), s, atol=1e-5, rtol=0)
    assert (seen[6] - w).norm() > 1
    torch.testing.assert_close(seen[9], (u[:, 2:] * s[2:]) @ v[:, 2:].mT, atol=1e-5, rtol=0)
    assert seen[10].abs().max() < 1e-5
    assert torch.equal(model.attention.weight, w)

    masked = {(m.what, m.share): m.score for m in mask(model, score, shares=[0.25])}
    assert masked["leading", 0.25] == pytest.approx(21**0.5, rel=1e-5)
    assert masked["trailing", 0.25] == pytest.approx(84**0.5, rel=1e-5)
    assert torch.equal(model.attention.weight, w)
    with pytest.raises(ValueError, match="no matrix of the kinds mlp"):
        Matrices(model, ["mlp"])


def test_a_swap_uses_the_vectors_of_the_source_it_names():
    w = matrix([4.0, 2.0, 1.0], 5, 3)[0].float()
    given = {
        what: matrix([1.0, 0.5, 0.2], 5, 3, seed)
        for what, seed in (("pretrained", 3), ("other task", 9))
    }
    model, seen = Two(w), []

    def score(m):
        seen.append(m.attention.weight.clone())
        return 0.0

    sources = {what: {"attention.weight": x.float()} for what, (x, _, _) in given.items()}
    scored = [s.what for s in swap(model, score, sources, shares=[1.0])]
    s = torch.tensor([4.0, 2.0, 1.0])
    for what, (_, p, q) in given.items():
        expected = (p.float() * s) @ q.float().mT
        torch.testing.assert_close(seen[scored.index(what)], expected, atol=1e-5, rtol=0)


def test_explained_variance_by_hand():
    w, _, _ = matrix([4.0, 2.0, 1.0], 7, 3)
    (a,) = align([pair(w, w)])
    torch.testing.assert_close(a.explained(), torch.tensor([16.0, 20.0, 21.0]).double() / 21)
    assert a.summary()["W in leading tenth"] == pytest.approx(16 / 21)


def test_gradients_are_summed_and_seen_in_the_basis():
    w, u, v = matrix([4.0, 3.0, 2.0], 5, 3)
    summed = 6 * torch.outer(u[:, 0], v[:, 0]) + 2 * torch.outer(u[:, 1], v[:, 1])
    (found,) = spectra({"attention.weight": w}, {"attention.weight": summed}, step=7)
    torch.testing.assert_close(found.s, torch.tensor([6.0, 2.0, 0.0]).double())
    torch.testing.assert_close(found.captured, torch.tensor([36 / 40, 1.0, 1.0]).double())
    assert found.effective_rank() == pytest.approx(64 / 40)
    assert found.step == 7

    model = Two(w.float())
    model.attention.weight.requires_grad_(True)
    recorder = CumulativeGradients(steps=(1,))

    class State:
        global_step = 0

    recorder.on_train_begin(None, State, None, model=model)
    for _ in range(2):
        model.attention.weight.grad = summed.float()
        recorder.on_pre_optimizer_step(None, State, None, model=model)
        State.global_step += 1
    recorder.on_train_end(None, State, None)
    assert [g.step for g in recorder.spectra] == [1, 2]
    assert recorder.spectra[1].s[0].item() == pytest.approx(12, rel=1e-5)


def alignments(amount, seed):
    """Two matrices: one moved by `amount` of the same noise every time, one by noise of its own."""
    w, _, _ = matrix(torch.linspace(8, 1, 20), 30, 20)

    def noise(seed):
        g = torch.Generator().manual_seed(seed)
        return torch.randn(30, 20, generator=g, dtype=torch.float64)

    moved = {"query": w + amount * noise(100), "key": w + 0.1 * noise(seed)}
    return align([Pair(f"layer.0.{n}.weight", "attention", 0, w, x) for n, x in moved.items()])


def some_runs(task, base, labels="true", start="pretrained", runs=4):
    for i in range(runs):
        fields = (f"r{i}", "full", task, start, labels, 1e-3, i, base - 3 * i)
        yield RunAlignment(*fields, alignments(0.02 * (i + 1), i))


def test_generalisation_finds_the_matrix_that_goes_with_the_score():
    runs = [*some_runs("rte", 60.0), *some_runs("cola", 20.0)]
    first, second = generalisation(runs)
    assert first.matrix == "layer.0.query"
    assert first.rho > 0.9
    assert first.p <= first.p_fdr <= first.p_holm < 0.05
    assert second.p_fdr > 0.05
    with pytest.raises(ValueError, match="over 4 runs says nothing"):
        generalisation(runs[:4])
    assert {"task", "best dev score", "attention: cosine, leading tenth"} <= set(runs[0].summary())


@pytest.mark.parametrize("odd", [{"labels": "random"}, {"start": "random"}])
def test_generalisation_compares_like_with_like(odd):
    # centred by task alone, the low scores of these equally stable runs would hide the correlation
    groups = [*some_runs("rte", 60.0), *some_runs("rte", 10.0, **odd)]
    first, _ = generalisation(groups)
    assert first.rho == pytest.approx(
        generalisation(groups[:4] + list(some_runs("cola", 1)))[0].rho
    )
    # a run without its like says nothing
    lonely = next(some_runs("cola", 5.0))
    assert generalisation([*groups, lonely]) == generalisation(groups)
    with pytest.raises(ValueError, match=r"over 4 runs .* shares task, labels and start"):
        generalisation([*groups[:4], lonely])
    values = torch.tensor([1.0, 3.0, 10.0, 30.0])
    centred = within_groups([*groups[:2], *groups[4:6]], values)
    assert centred.tolist() == [-1.0, 1.0, -10.0, 10.0]


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x, y):
        return SimpleNamespace(loss=(self.b(torch.tanh(self.a(x))) - y).square().mean())


def test_the_energy_of_a_whole_dense_core_is_that_of_the_weight():
    model = TwoLayers()
    batches = [dict(zip("xy", torch.randn(2, 5, 8), strict=True)) for _ in range(3)]
    before = {n: w.clone() for n, w in model.state_dict().items()}
    energy = coefficient_energy(model, SpectralConfig(rank="full", core="dense"), batches)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    for name in ("a", "b"):
        weight = model.get_submodule(name).weight
        gradients = [torch.autograd.grad(model(**batch).loss, weight)[0] for batch in batches]
        assert energy[name] == pytest.approx(sum(g.square().sum().item() for g in gradients), 1e-4)


@pytest.mark.parametrize(
    ("core", "rank", "energy", "expected"),
    [
        ("dense", 4, (3.0, 1.0), (4, 2)),  # of 32 numbers 24 and 8
        ("diag", 4, (3.0, 1.0), (6, 2)),
        ("band", 4, (3.0, 1.0), (6, 2)),
        ("diag", 8, (3.0, 1.0), (8, 4)),  # no more than there are
        ("dense", 4, (1.0, 0.0), (5, 0)),
    ],
)
def test_ranks_go_by_energy(core, rank, energy, expected):
    model, config = TwoLayers(), SpectralConfig(rank=rank, core=core)
    ranks = allocate(model, config, dict(zip("ab", energy, strict=True)))
    assert ranks == dict(zip("ab", expected, strict=True))
    adapted = fastspec.spectralize(model, SpectralConfig(rank=patterns(ranks), core=core))
    found = {n: layer.directions.rank for n, layer in spectral_layers(adapted)}
    assert found == {n: k for n, k in ranks.items() if k}


def test_tables():
    text = tables.markdown([{"a": "x", "b": 0.123456, "c": 3}, {"a": "y", "b": 1e-9, "c": ""}])
    assert text.splitlines()[1] == "| --- | ---: | ---: |"
    assert text.splitlines()[2] == "| x | 0.1235 | 3 |"
    assert "1e-09" in text
