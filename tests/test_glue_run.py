"""Whole runs on a tiny model: results, resumption after SIGKILL, comparison, the command line, offline."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from glue_support import make_model, make_task

from fastspec.cli import main
from fastspec.files import write_json
from fastspec.studies.commands.glue import parse_rank, parse_select
from fastspec.studies.glue import data, finetune
from fastspec.studies.glue.config import METHODS, GlueConfig
from fastspec.studies.glue.finetune import run
from fastspec.studies.glue.result import compare, read_result, table
from fastspec.studies.glue.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model in `model/` and tiny tasks in `glue/`."""
    folder = tmp_path_factory.mktemp("glue")
    make_model(folder / "model")
    for name in ("rte", "stsb", "mnli", "ax"):
        make_task(folder / "glue", TASKS[name], train=44, dev=12)
    return folder


def tiny(place, **fields):
    common = {"model": str(place / "model"), "data": str(place / "glue")}
    return GlueConfig(
        **{**common, "task": "rte", "rank": 8, "epochs": 2, "batch_size": 8, **fields}
    )


@pytest.fixture(scope="module")
def finished(place):
    config = tiny(place)
    return config, place / "finished", run(config, place / "finished", progress=False)


def test_the_result_says_all_that_a_repeat_needs(finished, place):
    config, folder, result = finished
    assert result == json.loads((folder / "result.json").read_text())
    assert GlueConfig.from_dict(result["config"]) == config
    assert len(result["losses"]) == 2 * 6  # ceil(44 / 8) steps an epoch
    assert [e["epoch"] for e in result["epochs"]] == [1, 2]
    assert result["last"] == result["epochs"][-1]
    assert result["best"]["score"] == max(e["score"] for e in result["epochs"])
    assert len(result["predictions"]["last"]["dev"]) == 12
    assert result["parameters"]["adapter"] == 8 * 13
    assert result["rates"]["coefficients"] == 3e-2
    assert result["rates"]["head"] == 1e-3
    assert result["data"]["kind"] == "folder"
    assert len(result["data"]["sha256"]["train"]) == 64
    assert len(result["model"]["fingerprint"]) == 64
    assert result["threads"] == torch.get_num_threads()
    assert {"torch", "transformers", "fastspec", "python"} <= set(result["versions"])
    assert result["step_ms"] > 0
    assert not list(folder.glob("checkpoint-*"))
    assert (folder / "adapter" / "adapter.safetensors").stat().st_size == result["adapter"]["bytes"]


def test_the_saved_adapter_gives_the_last_predictions(finished, place):
    import fastspec
    from fastspec.studies.encoders import load_classifier, load_tokenizer

    config, folder, result = finished
    model = load_classifier(str(place / "model"), TASKS["rte"])
    model = fastspec.spectralize(model, config.spectral(["classifier"]))
    fastspec.load_adapter(model, folder / "adapter")
    rows = data.load(TASKS["rte"], config.data).dev["dev"]
    tokenizer = load_tokenizer(str(place / "model"))
    batch = tokenizer(*map(list, zip(*rows.texts, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model.eval()(**batch).logits.argmax(-1).tolist()
    assert predicted == result["predictions"]["last"]["dev"]


def test_a_finished_run_is_kept_and_another_refused(finished, place):
    config, folder, result = finished
    stamp = (folder / "result.json").stat().st_mtime_ns
    assert run(config, folder, progress=False) == result
    assert (folder / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"holds a run with seed 0 \(asked: 1\)"):
        run(tiny(place, seed=1), folder, progress=False)
    stray = place / "stray"
    stray.mkdir()
    (stray / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        run(config, stray, overwrite=True, progress=False)
    assert (stray / "notes.txt").read_text() == "mine"


def test_a_run_does_not_go_on_with_other_rows(place, tmp_path):
    config = tiny(place, method="head", data=str(make_task(tmp_path, TASKS["rte"])), epochs=1)
    run(config, place / "rows", progress=False)
    (place / "rows" / "result.json").unlink()
    path = tmp_path / "RTE" / "dev.tsv"
    path.write_text(path.read_text() + "a dog\ta cat\t0\t99\n")
    with pytest.raises(ValueError, match="the rows changed since the run in"):
        run(config, place / "rows", progress=False)
    run(config, place / "rows", overwrite=True, progress=False)


def test_the_same_seed_repeats_and_another_does_not(finished, place):
    config, _, result = finished
    again = run(config, place / "again", progress=False)
    assert again["losses"] == result["losses"]
    assert again["predictions"] == result["predictions"]
    other = run(tiny(place, seed=1), place / "other", progress=False)
    assert other["losses"] != result["losses"]


def test_both_paths_agree(finished, place):
    _, _, fast = finished
    reference = run(tiny(place, path="reference"), place / "reference", progress=False)
    found = compare(reference, fast)
    assert found.steps == 12
    assert found.loss_difference < 1e-4
    assert abs(found.score_difference) <= 0.5
    assert found.predictions == 12


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method, place):
    config = tiny(place, method=method, epochs=6, lr=1e-2, head_lr=1e-2)
    result = run(config, place / f"learns-{method}", progress=False)
    losses = result["losses"]
    assert sum(losses[-6:]) < sum(losses[:6])
    assert result["adapter"]["bytes"] > 0


def test_matched_and_mismatched_and_unlabelled(place):
    result = run(tiny(place, task="ax", method="head", epochs=1), place / "ax", progress=False)
    assert {"matched_accuracy", "mismatched_accuracy", "score"} <= set(result["last"])
    assert set(result["predictions"]["last"]) == {"matched", "mismatched"}
    lines = (place / "ax" / "predictions-test.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(12)]
    assert {line.split("\t")[1] for line in lines[1:]} <= set(TASKS["ax"].labels)


def test_regression(place):
    result = run(tiny(place, task="stsb", method="full"), place / "stsb", progress=False)
    assert {"pearson", "spearman", "score"} <= set(result["last"])
    assert result["regression_tolerance"] == pytest.approx(5e-3)
    assert all(isinstance(v, float) for v in result["predictions"]["last"]["dev"])


def test_predictions_keep_the_order_of_the_file(place):
    # scored in order of length; a prediction must not depend on what else is in the file
    from fastspec.studies.glue.build import prepare
    from fastspec.studies.glue.data import Split
    from fastspec.studies.glue.finetune import _trainer

    config = tiny(place, method="head")
    prepared = prepare(config)
    rows = prepared.source.train
    backwards = Split(rows.texts[::-1], None, "")
    trainer = _trainer(config, prepared, rows, place / "order", False)
    forth, back = (
        trainer.logits(finetune.tokenise(prepared.tokenizer, split, 64))
        for split in (rows, backwards)
    )
    torch.testing.assert_close(forth, back.flip(0), rtol=1e-5, atol=1e-6)
    assert len({tuple(row) for row in forth.round(decimals=4).tolist()}) > 10


def test_batches_are_bucketed_and_repeat_by_epoch():
    from fastspec.studies.glue.trainer import EpochLengthSampler

    lengths = [(7 * i) % 97 + 3 for i in range(200)]
    sampler = EpochLengthSampler(8, lengths, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second
    sampler.set_epoch(0)
    torch.manual_seed(99)  # the order owes nothing to the global generator
    assert list(sampler) == first
    assert list(EpochLengthSampler(8, lengths, seed=4)) != first

    def padding(order):
        batches = [[lengths[i] for i in order[j : j + 8]] for j in range(0, len(order), 8)]
        return sum(max(b) * len(b) - sum(b) for b in batches)

    assert padding(first) < 0.5 * padding(range(200))


def test_divergence_is_an_error_with_advice(place):
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step .*: lower --lr"):
        run(tiny(place, method="full", lr=1e30), place / "diverged", progress=False)
    assert not (place / "diverged" / "result.json").exists()


def test_resuming_after_sigkill_gives_the_same_numbers(place):
    fields = {"train_bias": True, "epochs": 4, "batch_size": 4, "save_steps": 4, "seed": 5}
    config = tiny(place, **fields)
    folder = place / "killed"
    # every step waits a little, so that the kill falls where it should on any machine
    program = (
        "import sys, time\n"
        "from fastspec.studies.glue import trainer\n"
        "inner = trainer.CheckpointSchedule.on_step_end\n"
        "def slowly(*args, **kwargs):\n"
        "    time.sleep(0.1)\n"
        "    return inner(*args, **kwargs)\n"
        "trainer.CheckpointSchedule.on_step_end = slowly\n"
        "from fastspec.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "glue", "--task", "rte", "--output", str(folder)]
    command += ["--model", config.model, "--data", config.data, "--rank", "8", "--train-bias"]
    command += ["--epochs", "4", "--batch-size", "4", "--save-steps", "4", "--seed", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True
    )
    # 11 steps an epoch: step 15 is inside the second
    wanted = folder / "checkpoint-15" / "complete"
    deadline = time.monotonic() + 120
    while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert wanted.exists(), errors
    assert not (folder / "result.json").exists()
    # what a kill during the next checkpoint leaves behind must not be picked up
    torn = folder / "checkpoint-22"
    torn.mkdir(exist_ok=True)
    (torn / "trained.safetensors").write_bytes(b"\x00" * 10)

    resumed = run(config, folder, progress=False)
    whole = run(config, place / "whole", progress=False)
    assert resumed["resumed_from"] == "checkpoint-15"
    assert whole["resumed_from"] is None
    for name in ("losses", "epochs", "last", "best", "predictions", "rates", "parameters"):
        assert resumed[name] == whole[name], name
    a, b = (p / "adapter" / "adapter.safetensors" for p in (folder, place / "whole"))
    assert a.read_bytes() == b.read_bytes()


def test_a_folder_whose_first_file_was_never_finished_is_used(place):
    folder = place / "cut-off"
    folder.mkdir()
    (folder / ".config.json.abc123.tmp").write_text("{")
    assert run(tiny(place, method="head", epochs=1), folder, progress=False)["last"]


def test_a_second_process_waits_for_the_one_that_makes_the_run(place, capfd):
    """As after a kill of a suite, whose run goes on when the suite is started again."""
    config, folder = tiny(place, method="head", epochs=1), place / "shared"
    folder.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(folder / finetune.LOCK):
            second = pool.submit(run, config, folder)
            while "waiting for it to end" not in capfd.readouterr().out:
                time.sleep(0.01)
            assert not (folder / "config.json").exists()
        first = run(config, folder, progress=False)
        assert second.result() == first


def test_a_full_disk_is_said_in_words_and_loses_one_checkpoint_only(place, monkeypatch):
    fields = {"epochs": 2, "batch_size": 4, "save_steps": 4}
    config, folder = tiny(place, **fields), place / "full-disk"
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-11" in str(path):
            Path(path).write_bytes(b"PK")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        return save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"checkpoint-11 could not be written: .* Make room on its disk"
    ):
        run(config, folder, progress=False)
    assert not (folder / "checkpoint-11").exists()
    monkeypatch.undo()
    resumed = run(config, folder, progress=False)
    assert resumed["resumed_from"] == "checkpoint-8"
    assert resumed["losses"] == run(config, place / "roomy", progress=False)["losses"]


def test_compare_finds_what_differs(finished, tmp_path):
    _, _, result = finished
    other = json.loads(json.dumps(result))
    other["losses"][3] *= 1.25
    other["last"]["score"] += 2.0
    other["best"]["score"] -= 1.0
    flipped = other["predictions"]["last"]["dev"]
    flipped[0], flipped[5] = 1 - flipped[0], 1 - flipped[5]
    found = compare(result, other)
    assert found.loss_difference == pytest.approx(0.25)
    assert found.loss_step == 4
    assert found.score_difference == pytest.approx(2.0)
    assert found.best_difference == pytest.approx(-1.0)
    assert (found.differing, found.predictions) == (2, 12)
    other["losses"][:] = result["losses"] * 10
    other["losses"][50] = 100.0  # past the first 50 steps
    longer = {**result, "losses": result["losses"] * 10}
    assert compare(longer, other).loss_difference == 0.0
    other["data"]["sha256"]["train"] = "0" * 64
    with pytest.raises(ValueError, match=r"can't.*compare.*data\.sha256|data\.sha256"):
        compare(result, other)


def test_table_is_markdown_of_what_the_results_hold(finished):
    result = finished[2]
    head, rule, row = table([result]).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    assert f"{result['parameters']['adapter']:,} (" in row
    assert row.endswith(f"{result['best']['score']:.1f} | {result['last']['score']:.1f} |")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["result.json"]
    path.write_text('{"a": ')
    with pytest.raises(ValueError, match=r"result\.json: not readable as JSON"):
        read_result(tmp_path)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["glue", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    fields = [f.replace("_", "-") for f in GlueConfig.__dataclass_fields__]
    assert [f for f in fields if f"--{f}" not in text] == []
    assert "--compare" in text


def test_the_command_line_runs_compares_and_complains(place, capsys):
    base = ["glue", "--task", "rte", "--data", str(place / "glue"), "--model", str(place / "model")]
    for name in ("a", "b"):
        status = main([*base, "--method", "head", "--epochs", "1", "--output", str(place / name)])
        assert status == 0
    out = capsys.readouterr().out
    assert f"rte from {place / 'glue'} (folder): train 44, dev 12" in out
    assert "last epoch (1): accuracy" in out
    assert main(["glue", "--compare", str(place / "a"), str(place / "b" / "result.json")]) == 0
    assert "differ: 0 of 12" in capsys.readouterr().out
    bad = place / "bad" / "RTE"
    bad.mkdir(parents=True)
    (bad / "train.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\t7\n")
    (bad / "dev.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\t1\n")
    base[base.index("--data") + 1] = str(bad.parent)
    assert main([*base, "--output", str(place / "c")]) == 2
    assert "train.tsv:2: unknown label '7'" in capsys.readouterr().err
    assert main(["glue"]) == 2
    assert "--task is missing" in capsys.readouterr().err


def test_ranks_and_ranges_from_the_command_line():
    import argparse

    assert [parse_rank(t) for t in ("32", "0.5", "full")] == [32, 0.5, "full"]
    assert [parse_select(t) for t in ("leading", "trailing", "4:20")] == [
        "leading",
        "trailing",
        (4, 20),
    ]
    for parse, text in ((parse_rank, "half"), (parse_select, "4-20"), (parse_select, ":4")):
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            parse(text)


def test_local_model_and_data_open_no_connection(place):
    # LoRA too: PEFT asks the hub about the base model when it saves, if it may
    program = (
        "import socket, sys\n"
        "tried = []\n"
        "def refuse(*args, **kwargs):\n"
        "    tried.append(args)\n"
        "    raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
        "from fastspec.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "print('tried', tried)\n"
        "sys.exit(status or bool(tried))\n"
    )
    command = [sys.executable, "-c", program, "glue", "--task", "rte", "--method", "lora"]
    command += ["--model", str(place / "model"), "--data", str(place / "glue"), "--epochs", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "FASTSPEC_"))}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [*command, "--output", str(place / "offline")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tried []" in done.stdout
