"""Trainer and Accelerate: small checkpoints that resume bit for bit; the groups of the optimiser."""

import pytest
import torch
from glue_support import word_tokenizer
from support import relative_error
from tiny_models import bert

import fastspec
from fastspec import SpectralConfig, load_adapter, parameter_groups, spectralize

transformers = pytest.importorskip("transformers")

from fastspec.model.checkpoints import SpectralTrainer, checkpoint_adapters  # noqa: E402

RATES = {"lr": 3e-2, "head_lr": 1e-3}


def rows(n=48):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (n, 8), generator=g)
    return [{"input_ids": r, "labels": int(r.sum()) % 3} for r in ids]


class Killed(Exception):
    pass


class KillAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def trainer(folder, model=None, callbacks=(), **options):
    model = model or spectralize(bert(num_labels=3), SpectralConfig(rank=4, core="dense"))
    given = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4} | options
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **given,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, **RATES), fused=True)
    return SpectralTrainer(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(16),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


class LayerCalls:
    """Counts the forward passes of the encoder's layers, the ones made again in the backward included."""

    def __init__(self, model):
        self.count = 0
        for layer in model.bert.encoder.layer:
            layer.attention.register_forward_hook(self)

    def __call__(self, *_):
        self.count += 1


class SeenFromWorkers(torch.utils.data.Dataset):
    """Rows that only a worker process of a DataLoader may ask for."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        assert torch.utils.data.get_worker_info() is not None, "read in the main process"
        return self.data[i]


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def losses(run):
    return {e["step"]: e["loss"] for e in run.state.log_history if "loss" in e}


OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "num_train_epochs": 4},
    "gradient-checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "workers": {"dataloader_num_workers": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, options):
    whole = trainer(tmp_path / "whole", **options)
    start = trained(whole.model)
    whole.train()
    want = trained(whole.model)
    assert all(not torch.equal(want[n], start[n]) for n in want), "every parameter learns"

    killed = trainer(tmp_path / "killed", callbacks=[KillAt(7)], **options)
    with pytest.raises(Killed):
        killed.train()
    resumed = trainer(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)  # of step 4: in the middle of an epoch
    got = trained(resumed.model)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize("name", ["accumulation", "bf16", "label-smoothing"])
def test_the_option_takes_effect(tmp_path, name):
    """Else every run above would be the plain one."""
    steps = {"max_steps": 3, "save_strategy": "no"}
    plain, run = (trainer(tmp_path, **options, **steps) for options in ({}, OPTIONS[name]))
    for each in (plain, run):
        each.train()
    a, b = losses(plain), losses(run)
    assert a.keys() == b.keys() == {1, 2, 3}
    assert all(a[step] != b[step] for step in a)
    if (
        name == "accumulation"
    ):  # Trainer adds such a model's losses up, as those of parts of one batch
        assert run.state.epoch == 2 * plain.state.epoch, "twice the batches a step"
    else:
        assert all(a[step] == pytest.approx(b[step], rel=0.3) for step in a)


def test_gradient_checkpointing_runs_layers_twice_and_changes_nothing_else(tmp_path):
    def weights(on):
        run = trainer(tmp_path / str(on), gradient_checkpointing=on, max_steps=3)
        calls = LayerCalls(run.model)
        run.train()
        return trained(run.model), calls.count

    (a, once), (b, twice) = weights(False), weights(True)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert once == 2 * 3, "two layers, three steps"
    assert twice == 2 * once


def test_workers_read_the_rows(tmp_path):
    run = trainer(tmp_path, max_steps=2, **OPTIONS["workers"])
    run.train_dataset = SeenFromWorkers(rows())
    run.train()
    run = trainer(tmp_path, max_steps=2)
    run.train_dataset = SeenFromWorkers(rows())
    with pytest.raises(AssertionError, match="main process"):
        run.train()


def test_a_checkpoint_is_an_adapter_and_the_optimiser_of_it(tmp_path):
    run = trainer(tmp_path, max_steps=4)
    run.train()
    folder = tmp_path / "checkpoint-4"
    assert {p.name for p in folder.iterdir()} == {
        "adapter.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
    }
    numbers = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    digests = 100 * len(list(run.model.parameters()))
    assert (folder / "adapter.safetensors").stat().st_size < 4 * numbers + digests + 4096
    ids = torch.arange(16).reshape(2, 8)
    want = run.model.eval()(ids).logits
    assert torch.equal(load_adapter(bert(num_labels=3), folder).eval()(ids).logits, want)


def test_the_tokenizer_is_saved_beside_the_adapter(tmp_path):
    run = trainer(tmp_path / "run", max_steps=1)
    run.processing_class = tokenizer = word_tokenizer(["a", "dog"])
    run.save_model(tmp_path / "best")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "best")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    arguments = torch.load(tmp_path / "best" / "training_args.bin", weights_only=False)
    assert arguments.to_dict() == run.args.to_dict()
    load_adapter(bert(num_labels=3), tmp_path / "best")


def test_load_best_model_at_end(tmp_path):
    run = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=1.0,
        metric_for_best_model="worst",
        greater_is_better=False,
    )
    # the first evaluation is the best by decree, so that the last step is not
    run.compute_metrics = lambda _: {"worst": run.state.global_step}
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    best = load_adapter(bert(num_labels=3), tmp_path / "checkpoint-2")
    last = load_adapter(bert(num_labels=3), tmp_path / "checkpoint-12")
    got, want, other = trained(run.model), trained(best), trained(last)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert any(not torch.equal(got[n], other[n]) for n in want)


def test_resuming_on_other_base_weights_is_refused(tmp_path):
    trainer(tmp_path, max_steps=4).train()
    torch.manual_seed(1)
    other = transformers.BertForSequenceClassification(bert(num_labels=3).config)
    run = trainer(tmp_path, model=spectralize(other, SpectralConfig(rank=4, core="dense")))
    with pytest.raises(fastspec.model.adapter.AdapterError, match="other base weights"):
        run.train(resume_from_checkpoint=True)


def test_a_plain_model_is_refused_before_training(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"spectralize\(model, config\) before the Trainer"):
        SpectralTrainer(bert(num_labels=3), arguments)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engines_that_write_checkpoints_of_their_own_are_refused(tmp_path, monkeypatch, engine):
    # the real switches need several processes, or DeepSpeed installed
    def switched_on(run):
        setup(run)
        setattr(run, f"is_{engine}_enabled", True)

    setup = SpectralTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(SpectralTrainer, "create_accelerator_and_postprocess", switched_on)
    model = spectralize(bert(num_labels=3), SpectralConfig(rank=4))
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"does not write {engine} checkpoints: use plain DDP"):
        SpectralTrainer(model, arguments)


class TestAccelerate:
    def step(self, accelerator, model, optimizer, batch):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def prepared(self):
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        checkpoint_adapters(accelerator)
        torch.manual_seed(3)
        model = spectralize(bert(num_labels=3), SpectralConfig(rank=4))
        optimizer = torch.optim.AdamW(parameter_groups(model, **RATES), fused=True)
        plain = torch.nn.Linear(2, 2)
        return accelerator, *accelerator.prepare(plain, model, optimizer)

    def test_save_state_and_load_state(self, tmp_path):
        batch = {"input_ids": torch.arange(16).reshape(2, 8), "labels": torch.tensor([0, 2])}
        accelerator, plain, model, optimizer = self.prepared()
        for _ in range(2):
            self.step(accelerator, model, optimizer, batch)
        accelerator.save_state(tmp_path)
        want = [self.step(accelerator, model, optimizer, batch) for _ in range(2)]
        files = {p.name for p in tmp_path.iterdir()}
        assert "adapter" in files
        assert (tmp_path / "model.safetensors").stat().st_size < 1000, "of the plain model alone"

        accelerator, resumed_plain, resumed, optimizer = self.prepared()
        with torch.no_grad():
            resumed_plain.weight.zero_()
        accelerator.load_state(tmp_path)
        assert [self.step(accelerator, resumed, optimizer, batch) for _ in range(2)] == want
        assert torch.equal(resumed_plain.weight, plain.weight)
        a, b = trained(resumed), trained(model)
        assert all(torch.equal(a[n], b[n]) for n in b)


class TestParameterGroups:
    def test_two_by_default(self):
        model = spectralize(bert(num_labels=3), SpectralConfig(rank=4))
        coefficients, head = parameter_groups(model, **RATES)
        assert (coefficients["name"], coefficients["lr"]) == ("coefficients", 3e-2)
        assert (head["name"], head["lr"]) == ("head", 1e-3)
        assert [p.shape for p in head["params"]] == [(3, 16), (3,)]
        deltas = [p for n, p in model.named_parameters() if n.endswith(".delta")]
        assert [id(p) for p in coefficients["params"]] == [id(p) for p in deltas]

    def test_kinds_rates_and_decay(self):
        config = SpectralConfig(rank=4, core="dense", train_bias=True, train_layernorm=True)
        model = spectralize(bert(num_labels=3), config)
        groups = parameter_groups(
            model, 3e-2, head_lr=1e-3, bias_lr=2e-3, coefficient_decay=0.1, weight_decay=0.01
        )
        described = {(g["name"], g["weight_decay"]): g["lr"] for g in groups}
        assert described == {
            ("coefficients", 0.1): 3e-2,
            ("extra", 0.0): 2e-3,
            ("head", 0.01): 1e-3,
            ("head", 0.0): 1e-3,
        }
        assert len(groups) == len(described), "no more groups than needed"
        grouped = [id(p) for g in groups for p in g["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        names = {id(p): n for n, p in model.named_parameters()}
        for g in groups:
            for p in g["params"]:
                is_delta = names[id(p)].endswith(".delta")
                assert is_delta == (g["name"] == "coefficients")
                assert names[id(p)].startswith("classifier.") == (g["name"] == "head")

    def test_fused_steps_equal_plain_ones(self):
        models = [spectralize(bert(num_labels=3), SpectralConfig(rank=4)).eval() for _ in range(2)]
        for model, fused in zip(models, (True, False), strict=True):
            groups = parameter_groups(model, **RATES)
            optimizer = torch.optim.AdamW(groups, fused=fused, foreach=False)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.arange(16).reshape(2, 8), labels=torch.tensor([0, 2])).loss.backward()
                optimizer.step()
        a, b = map(trained, models)
        assert all(relative_error(a[n], b[n]) < 1e-5 for n in a)

    def test_refusals(self):
        with pytest.raises(ValueError, match="no spectral adapter"):
            parameter_groups(bert(num_labels=3), 1e-2)
        model = spectralize(bert(num_labels=3), SpectralConfig(rank=4)).requires_grad_(False)
        with pytest.raises(ValueError, match="nothing to optimise"):
            parameter_groups(model, 1e-2)

    def test_models_of_other_methods_name_their_heads(self):
        groups = parameter_groups(bert(num_labels=3), 1e-4, heads=["classifier"], weight_decay=0.01)
        assert {g["name"] for g in groups} == {"extra", "head"}
