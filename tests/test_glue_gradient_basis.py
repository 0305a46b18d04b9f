"""The basis of the task's own gradient: what it is, that a run keeps it and is restored with it."""

import pytest
import torch
from glue_support import make_model, make_task

from fastspec.model.targets import spectral_layers
from fastspec.studies.glue import build, donor_basis
from fastspec.studies.glue.config import GlueConfig
from fastspec.studies.glue.evaluate import Scorer
from fastspec.studies.glue.finetune import run
from fastspec.studies.glue.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")
K = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradient")
    make_model(folder / "model")
    make_task(folder / "glue", TASKS["rte"], train=24, dev=10)
    return folder


def config_of(place, **fields):
    common = {"model": str(place / "model"), "data": str(place / "glue"), "task": "rte"}
    spectral = {"core": "dense", "rank": K, "basis_model": "gradient"}
    return GlueConfig(**{**common, **spectral, "epochs": 2, "batch_size": 8, **fields})


def batches_of(prepared):
    return list(
        donor_basis.first_batches(prepared.tokenizer, prepared.source.train, prepared.config)
    )


def test_the_gradient_is_the_plain_models(place):
    prepared = build.prepare(config_of(place))
    plain = build.prepare(config_of(place, method="full", basis_model=None)).model.eval()
    batches = batches_of(prepared)
    assert sum(len(b["labels"]) for b in batches) == 24
    prepared.model.train()
    sums = donor_basis.summed_gradients(prepared.model, batches)
    for batch in batches:
        plain(**batch).loss.backward()
    assert len(sums) == len(list(spectral_layers(prepared.model))) > 0
    for name, total in sums.items():
        torch.testing.assert_close(total, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-7)
    assert prepared.model.training
    assert not any(layer.weight.requires_grad for _, layer in spectral_layers(prepared.model))


def test_the_basis_is_the_gradients_and_is_kept(place, tmp_path, monkeypatch):
    prepared = build.prepare(config_of(place))
    sums = donor_basis.summed_gradients(prepared.model, batches_of(prepared))
    donor_basis.use_gradients(prepared.model, batches_of(prepared), tmp_path)
    for name, layer in spectral_layers(prepared.model):
        total = sums[f"{name}.weight"]
        s = torch.linalg.svdvals(total)
        held = (layer.u.mT @ total @ layer.vh.mT).diagonal()
        torch.testing.assert_close(held, s[:K], rtol=1e-3, atol=1e-3 * s[0].item())
        assert not layer.singular_basis
    monkeypatch.setattr(donor_basis, "summed_gradients", lambda *_: pytest.fail("made again"))
    again = build.prepare(config_of(place))
    donor_basis.use_gradients(again.model, batches_of(again), tmp_path)  # as a run that goes on
    pairs = zip(spectral_layers(prepared.model), spectral_layers(again.model), strict=True)
    for (_, a), (_, b) in pairs:
        for side in ("u", "s", "vh"):
            assert torch.equal(getattr(a, side), getattr(b, side)), side


def test_a_run_is_restored_with_its_basis(place):
    folder = place / "run"
    config = config_of(place, lr=0.1)
    result = run(config, folder, progress=False)
    assert result["parameters"]["adapter"] == K * K * len(
        list(spectral_layers(build.prepare(config).model))
    )
    assert result["losses"][-1] != result["losses"][0]
    merged = build.merged(folder)
    score = Scorer(build.prepare(config).source, merged.tokenizer, batch_size=3)
    assert score(merged.model)["score"] == result["last"]["score"]
    start = build.starting_weights(folder)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    update = build.effective_weights(build.finished(folder).model)[name] - start[name]
    assert torch.linalg.matrix_rank(update, rtol=1e-4) == K


def test_another_seed_has_another_basis(place):
    seeds = [build.prepare(config_of(place, seed=seed)) for seed in (0, 1)]
    sums = [donor_basis.summed_gradients(p.model, batches_of(p)) for p in seeds]
    assert all(not torch.allclose(sums[0][name], sums[1][name]) for name in sums[0])


def test_overwriting_makes_a_new_basis(place, tmp_path):
    folder = tmp_path / "run"
    run(config_of(place), folder, progress=False)
    first = (folder / donor_basis.FILE).read_bytes()
    run(config_of(place, seed=1), folder, overwrite=True, progress=False)
    assert (folder / donor_basis.FILE).read_bytes() != first
