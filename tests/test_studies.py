"""A miniature of every study in docs/studies.md, from the command line."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from glue_support import make_model, make_task

from fastspec.cli import COMMANDS, main
from fastspec.files import write_json
from fastspec.studies.analyze import pretraining, transplant
from fastspec.studies.analyze.weights import kind_of, load_weights
from fastspec.studies.glue.tasks import TASKS

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")
STUDIES = Path(__file__).parent.parent / "docs" / "studies.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, two tasks, and runs of them."""
    folder = tmp_path_factory.mktemp("studies")
    make_model(folder / "model")
    for task in ("rte", "cola"):
        make_task(folder / "glue", TASKS[task], train=16, dev=8)
    for name, task, extra in RUNS:
        words = ["glue", "--task", task, "--output", str(folder / name), *ON(folder), *extra]
        assert main([*words, "--epochs", "1", "--batch-size", "8", "--threads", "1"]) == 0
    return folder


def ON(folder):
    return ["--model", str(folder / "model"), "--data", str(folder / "glue")]


FULL = ["--method", "full", "--lr", "1e-2"]
RUNS = [
    ("rte", "rte", FULL),
    ("rte-seed1", "rte", [*FULL, "--seed", "1"]),
    ("rte-random-labels", "rte", [*FULL, "--labels", "random"]),
    ("rte-scratch", "rte", [*FULL, "--start", "random"]),
    ("cola", "cola", FULL),
]


def rows(path):
    return list(csv.DictReader(path.open()))


def pictures(folder):
    found = sorted(folder.glob("*.png"))
    for path in found:
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        # wider pictures are shrunk to illegible text where READMEs are shown
        assert int.from_bytes(head[16:20]) <= 1250, path
    return [p.stem for p in found]


def test_weights_of_a_run_from_its_start_to_its_end(place):
    out = place / "weights"
    assert main(["analyze", "weights", str(place / "rte"), "-o", str(out)]) == 0
    found = rows(out / "matrices.csv")
    assert len(found) == 13
    assert {row["kind"] for row in found} == {"attention", "mlp", "other"}
    assert all(float(row["norm of dW over W"]) > 0 for row in found)
    assert {"mean over matrices", "attention", "mlp", "other"} == set(rows(out / "kinds.csv")[0])
    assert pictures(out) == ["alignment", "profile", "update"]


def test_weights_of_two_runs(place):
    out = place / "two"
    words = ["analyze", "weights", str(place / "rte"), str(place / "cola"), "-o", str(out)]
    assert main(words) == 0
    assert len(rows(out / "matrices.csv")) == 13


def test_swap(place):
    out = place / "swap"
    words = ["analyze", "swap", str(place / "rte"), "--other", str(place / "cola")]
    assert main([*words, "--shares", "0.5", "--rows", "6", "-o", str(out)]) == 0
    sources = [row["what"] for row in rows(out / "swap.csv")]
    assert sources[0] == "own"
    assert sources[1:] == [
        *(f"{s}{end}" for s in ("pretrained", "other task", "random") for end in ("", " spans")),
        "zero",
    ]
    assert pictures(out) == ["swap"]


def test_swap_takes_the_vectors_of_the_start_and_of_the_other_run(place, monkeypatch):
    given = {}

    def spy(model, score, sources, **options):
        given.update(sources)
        return [transplant.Scored("own", 0.0, score(model)), transplant.Scored("zero", 1.0, 0.0)]

    monkeypatch.setattr(transplant, "swap", spy)
    words = ["analyze", "swap", str(place / "rte"), "--other", str(place / "cola")]
    assert main([*words, "-o", str(place / "spied")]) == 0
    name = "bert.encoder.layer.0.attention.self.query.weight"
    start = load_weights(place / "model")[name.removeprefix("bert.")]
    assert torch.equal(given["pretrained"][name], start)
    assert torch.equal(given["other task"][name], load_weights(place / "cola")[name])
    assert not torch.equal(given["other task"][name], start)


@pytest.mark.parametrize("what", ["mask", "swap"])
def test_one_kind_of_matrix_alone(place, what, monkeypatch):
    changed, real = set(), getattr(transplant, what)

    def spy(model, score, *args, **options):
        before = {n: p.clone() for n, p in model.named_parameters()}

        def watched(m):
            changed.update(n for n, p in m.named_parameters() if not torch.equal(p, before[n]))
            return score(m)

        return real(model, watched, *args, **options)

    monkeypatch.setattr(transplant, what, spy)
    words = ["analyze", what, str(place / "rte"), "--kinds", "attention", "--shares", "0.5"]
    assert main([*words, "--rows", "4", "-o", str(place / "attention")]) == 0
    assert len(changed) == 8
    assert {kind_of(name) for name in changed} == {"attention"}


def test_mask(place):
    out = place / "mask"
    words = ["analyze", "mask", str(place / "rte"), "--shares", "0.1", "0.9", "-o", str(out)]
    assert main(words) == 0
    assert len(rows(out / "mask.csv")) == 5
    assert pictures(out) == ["mask"]


def test_gradients(place):
    out = place / "gradients"
    words = ["analyze", "gradients", "--task", "rte", *ON(place), "--steps", "1"]
    assert main([*words, "-o", str(out)]) == 0
    found = rows(out / "gradients.csv")
    assert {row["step"] for row in found} == {"1"}  # of a single step of 32 rows
    assert all(1 <= float(row["effective rank"]) <= float(row["of"]) for row in found)
    assert pictures(out) == ["gradients"]


def test_runs_and_generalisation(place, capsys):
    out = place / "runs"
    assert main(["analyze", "runs", *(str(place / name) for name, *_ in RUNS), "-o", str(out)]) == 0
    found = rows(out / "runs.csv")
    assert [row["labels"] for row in found] == ["true", "true", "random", "true", "true"]
    assert [row["start"] for row in found] == ["pretrained"] * 3 + ["random", "pretrained"]
    assert all(0 < float(row["attention: subspace, leading tenth"]) <= 1 for row in found)
    assert pictures(out) == ["runs"]
    capsys.readouterr()
    assert not (out / "generalisation.csv").exists()  # only two share task, labels and start
    few = ["analyze", "runs", str(place / "rte"), "-o", str(out)]
    assert main(few) == 0
    assert "no correlations: they take 5 runs or more" in capsys.readouterr().out


def test_ranks_by_gradient_energy(place, capsys):
    out = place / "ranks"
    words = ["analyze", "ranks", "--task", "rte", *ON(place), "--rank", "8", "-o", str(out)]
    assert main([*words, "--batches", "2"]) == 0
    ranks = json.loads((out / "ranks.json").read_text())
    assert len(set(ranks.values())) > 1
    assert sum(k * k for k in ranks.values()) <= 12 * 8 * 8
    words = ["glue", "--task", "rte", *ON(place), "--core", "dense", "--train-pooler"]
    words += ["--rank", str(out / "ranks.json"), "--epochs", "1", "--output", str(place / "ranked")]
    assert main(words) == 0
    result = json.loads((place / "ranked" / "result.json").read_text())
    assert result["parameters"]["adapter"] == sum(k * k for k in ranks.values())
    assert result["label"] == "spectral-dense-k-by-layer-pooler"
    assert main(["analyze", "mask", str(place / "ranked"), "--shares", "0.5", "-o", str(out)]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words, "--rank", str(out / "nothing.json")])
    assert "nothing.json" in capsys.readouterr().err


def test_pretraining_scale(place, monkeypatch):
    small = {"posttraining_steps": 4, "width": 16, "layers": 1, "labelled": 64, "test": 64}
    study = pretraining.Study

    def smaller(**given):
        return study(**{**small, **given})

    monkeypatch.setattr(pretraining, "Study", smaller)
    out = place / "pretraining"
    words = ["analyze", "pretraining", "--sizes", "0", "40", "--seeds", "0", "1", "--steps", "5"]
    assert main([*words, "-o", str(out)]) == 0
    found = rows(out / "pretraining.csv")
    assert [(row["images"], row["seed"]) for row in found] == [
        ("0", "0"),
        ("40", "0"),
        ("0", "1"),
        ("40", "1"),
    ]
    assert all(0 < float(row["random spans"]) < float(row["subspace cosine"]) <= 1 for row in found)
    assert pictures(out) == ["pretraining"]
    with pytest.raises(ValueError, match="leaves 1669 images for pretraining, got 5000"):
        next(pretraining.run(smaller(sizes=(5000,))))
    with pytest.raises(ValueError, match="source must be one of digits, cifar10"):
        study(source="imagenet")


def test_the_autoencoder_learns_and_hides_what_it_paints():
    torch.manual_seed(0)
    images, labels = pretraining.load_images("digits")
    assert images.shape == (1797, 1, 16, 16)
    assert len(labels) == 1797
    model = pretraining.Autoencoder((1, 16, 16), 16, 1)
    patches = model.encoder.patches(images[:2])
    torch.testing.assert_close(patches[1, 5], images[1, 0, 4:8, 4:8].flatten())
    study = pretraining.Study(pretraining_steps=40, rate=3e-3)
    first = model(images[:64], torch.Generator().manual_seed(0)).item()
    assert pretraining.pretrain(model, images[:64], study, seed=0) < 0.8 * first
    # the loss is over unseen patches only: with the decoder silenced, what is seen can't change it
    torch.nn.init.zeros_(model.paint.weight)
    torch.nn.init.zeros_(model.paint.bias)
    order = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)).argsort(1)
    changed = images[:2].clone()
    for i in range(2):
        for place in order[i, : model.SEEN].tolist():
            y, x = 4 * (place // 4), 4 * (place % 4)
            changed[i, :, y : y + 4, x : x + 4] = 9.0
    before, after = (
        model(x, torch.Generator().manual_seed(1)).item() for x in (images[:2], changed)
    )
    assert before == after


def test_every_command_in_the_studies_page_parses(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_json("runs/analyze-ranks/ranks.json", {".*": 2})  # which one command takes from another
    commands = re.findall(r"`(fastspec (?:glue|analyze) [^`]+)`", STUDIES.read_text("utf-8"))
    assert len(commands) >= 10
    for module in {COMMANDS[c.split()[1]][0] for c in commands}:
        monkeypatch.setattr(f"{module}.main", lambda args: 0)
    for command in commands:
        assert main(command.split()[1:]) == 0, command
