"""The controls: other models' bases, untrained starts, random labels, rates relative to the spectrum."""

import dataclasses

import pytest
import torch
from glue_support import make_model, make_task

from fastspec.model.targets import spectral_layers
from fastspec.studies.glue import build, methods
from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.finetune import run
from fastspec.studies.glue.optimizer import ScaledAdamW, spectral_scale
from fastspec.studies.glue.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    make_model(folder / "model")
    make_task(folder / "glue", TASKS["rte"], train=24, dev=10)
    return folder


def tiny(place, **fields):
    common = {"model": str(place / "model"), "data": str(place / "glue"), "task": "rte"}
    return GlueConfig(**{**common, "rank": 8, "epochs": 1, "batch_size": 8, **fields})


@pytest.fixture(scope="module")
def scratch(place):
    """A finished run from random weights."""
    config = tiny(place, method="full", start="random", lr=1e-2)
    return config, place / "scratch", run(config, place / "scratch", progress=False)


def layers_of(config):
    return dict(spectral_layers(build.build(config, TASKS["rte"]).model))


def test_an_untrained_start_is_drawn_from_the_seed(place, scratch):
    config, folder, result = scratch
    pretrained = build.prepare(dataclasses.replace(config, start="pretrained"))
    assert result["model"]["fingerprint"] != pretrained.fingerprint
    start = build.starting_weights(folder)
    again = build.build(config, TASKS["rte"])
    for name, w in again.model.bert.named_parameters(prefix="bert"):
        assert torch.equal(start[name], w), name
    end = build.effective_weights(build.finished(folder).model)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert (end[name] - start[name]).abs().max() > 1e-3
    # transformers' own initialisation: normal with the configuration's standard deviation
    assert start[name].std().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("donor", ["random", "scratch"])
def test_the_basis_is_that_of_the_other_model(place, scratch, donor):
    folder = str(scratch[1]) if donor == "scratch" else donor
    # not seed 0, of which the tiny model itself was drawn
    config = tiny(place, basis_model=folder, core="dense", seed=5)
    adapted = build.build(config, TASKS["rte"])
    if donor == "scratch":
        weights = build.effective_weights(build.finished(folder).model)
    else:
        weights = build.basis_weights(config, adapted.model)
    for name, layer in spectral_layers(adapted.model):
        u, s, vh = torch.linalg.svd(weights[f"{name}.weight"])
        cosines = (layer.u * u[:, :8]).sum(0) * (layer.vh * vh[:8]).sum(1)
        torch.testing.assert_close(cosines, torch.ones(8), atol=1e-3, rtol=0)
        assert not layer.singular_basis
        assert (layer.u * torch.linalg.svd(layer.weight)[0][:, :8]).sum(0).abs().max() < 0.95
    assert s[0] > 0


def test_a_run_on_another_basis_is_restored(place, scratch):
    config = tiny(place, basis_model=str(scratch[1]), lr=0.1)
    run(config, place / "other-basis", progress=False)
    before = build.starting_weights(place / "other-basis")
    after = build.effective_weights(build.finished(place / "other-basis").model)
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert {n for n in moved if not n.startswith("classifier")} == {
        f"{name}.weight" for name in layers_of(tiny(place))
    }
    folder = place / "other-basis"
    with pytest.raises(ValueError, match="basis_model"):
        run(dataclasses.replace(config, basis_model="random"), folder, progress=False)


@pytest.mark.parametrize("method", ["spectral", "full", "lora", "pissa", "bitfit", "head"])
def test_finished_runs_give_their_predictions_again(place, method):
    from fastspec.studies.glue.evaluate import Scorer

    config = tiny(place, method=method, lr=1e-2)
    result = run(config, place / f"restored-{method}", progress=False)
    merged = build.merged(place / f"restored-{method}")
    source = build.prepare(config).source
    score = Scorer(source, merged.tokenizer, batch_size=3)
    assert score(merged.model)["score"] == result["last"]["score"]
    assert Scorer(source, merged.tokenizer, rows=4).labels["dev"] == source.dev["dev"].labels[:4]


def test_random_labels_are_the_same_labels_in_another_order(place):
    true = build.prepare(tiny(place)).source.train
    config = tiny(place, labels="random", seed=3)
    random = build.prepare(config).source.train
    assert random.texts == true.texts
    assert sorted(random.labels) == sorted(true.labels)
    assert random.labels != true.labels
    assert random.labels == build.prepare(config).source.train.labels
    assert (
        build.prepare(config).source.dev["dev"].labels
        == build.prepare(tiny(place)).source.dev["dev"].labels
    )


@pytest.mark.parametrize("core", ["diag", "band", "dense"])
def test_rates_follow_the_spectrum(place, core):
    layers = layers_of(tiny(place, core=core, half_width=2 if core == "band" else 1))
    layer = next(iter(layers.values()))
    scale = spectral_scale(layer)
    assert scale.shape == layer.delta.shape
    s = layer.s
    if core == "diag":
        expected = s / s.mean()
        torch.testing.assert_close(scale, expected)
    if core == "dense":
        assert scale.mean().item() == pytest.approx(1, rel=1e-5)
        assert (scale[0, 3] / scale[2, 5]).item() == pytest.approx(
            (s[0] * s[3] / (s[2] * s[5])).sqrt().item(), rel=1e-5
        )
    if core == "band":
        trained = 8 + 2 * 7 + 2 * 6
        assert (scale != 0).sum().item() == trained
        assert scale.sum().item() == pytest.approx(trained, rel=1e-5)


def test_a_scaled_step_is_a_step_of_the_scaled_parameter():
    torch.manual_seed(0)
    target, scale = torch.randn(7), torch.rand(7) + 0.5
    p = torch.nn.Parameter(torch.zeros(7))
    theta = torch.nn.Parameter(torch.zeros(7))
    ours = ScaledAdamW([{"params": [p], "lr": 0.1, "weight_decay": 0.0}], {p: scale})
    plain = torch.optim.AdamW([theta], lr=0.1, weight_decay=0.0)
    for _ in range(20):
        for optimizer, value in ((ours, p), (plain, scale * theta)):
            optimizer.zero_grad()
            (value - target).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(p, scale * theta, rtol=1e-4, atol=1e-5)
    assert (p - target).norm() < target.norm()


def test_the_trainer_uses_the_rule(place):
    flat = run(tiny(place, epochs=2), place / "flat", progress=False)
    config = tiny(place, epochs=2, rate_rule="spectrum")
    spectrum = run(config, place / "spectrum", progress=False)
    assert spectrum["losses"][0] == flat["losses"][0]
    assert spectrum["losses"][3:] != flat["losses"][3:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": "cold"}, "start must be one of pretrained, random, got 'cold'"),
        ({"labels": "none"}, "labels must be one of true, random"),
        ({"rate_rule": "steep"}, "rate_rule must be one of flat, spectrum"),
        ({"method": "full", "basis_model": "random"}, "got method='full' and basis='svd'"),
        ({"basis": "random", "basis_model": "random"}, "with basis='svd'"),
    ],
)
def test_odd_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GlueConfig(task="rte", **fields)


def test_controls_have_names_of_their_own(place):
    labels = {
        GlueConfig(task="rte", **fields).label()
        for fields in (
            {},
            {"start": "random"},
            {"labels": "random"},
            {"target_modules": "query"},
            {"basis_model": "random"},
            {"basis_model": "runs/some-run"},
            {"rate_rule": "spectrum"},
        )
    }
    assert len(labels) == 7
    assert methods.default_rate(GlueConfig(task="rte", start="random")).value > 0
