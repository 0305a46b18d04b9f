"""What `fastspec analyze` measures on weights whose answers are known."""

import csv
import math

import pytest
import torch
from matrices import matrix, pair
from safetensors.torch import save_file

from fastspec.cli import main
from fastspec.studies.analyze import tables
from fastspec.studies.analyze.alignment import align, clusters, rank_ranges
from fastspec.studies.analyze.weights import kind_of, layer_of, load_weights, pairs


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


def test_what_of_an_update_lies_beyond_the_span_of_a_rectangle():
    """No core can represent it."""
    w, u, _ = matrix([4.0, 2.0, 1.0], 12, 3)
    inside, outside = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0)).double()
    inside = u @ u.mT @ inside
    outside = outside - u @ u.mT @ outside
    (found,) = align([pair(w, w + 0.01 * (3 * inside / inside.norm() + outside / outside.norm()))])
    assert found.summary()["dW in W's span"] == pytest.approx(0.9, abs=1e-4)
    assert found.summary()["dW in it by chance"] == 0.25


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


def test_explained_variance_by_hand():
    w, _, _ = matrix([4.0, 2.0, 1.0], 7, 3)
    (a,) = align([pair(w, w)])
    torch.testing.assert_close(a.explained(), torch.tensor([16.0, 20.0, 21.0]).double() / 21)
    assert a.summary()["W in leading tenth"] == pytest.approx(16 / 21)


def test_tables():
    text = tables.markdown([{"a": "x", "b": 0.123456, "c": 3}, {"a": "y", "b": 1e-9, "c": ""}])
    assert text.splitlines()[1] == "| --- | ---: | ---: |"
    assert text.splitlines()[2] == "| x | 0.1235 | 3 |"
    assert "1e-09" in text
