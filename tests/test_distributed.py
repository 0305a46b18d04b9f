"""DDP and FSDP2 through torchrun on gloo: one process's losses, on any number, also after a kill."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_train import STEPS, adapted, batch, optimizer_of
from safetensors.torch import load_file
from support import assert_close

import fastspec
from fastspec.model.fsdp import shard_factors
from fastspec.model.targets import spectral_layers

PROGRAM = Path(__file__).with_name("distributed_train.py")


@pytest.fixture(scope="module")
def alone():
    """The losses and the trained model of one process without any of it."""
    model = adapted()
    optimizer = optimizer_of(model)
    losses = []
    for step in range(STEPS):
        loss = model(batch(step, 0, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def torchrun(processes, *arguments, fails=False, program=PROGRAM):
    """What the program prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(program), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (run.returncode != 0) == fails, run.stderr[-9000:]
    return run.stdout


def held(output):
    return [int(n) for n in re.findall(r"rank \d holds (\d+)", output)]


@pytest.mark.parametrize(
    ("processes", "mode", "killed"),
    [
        (2, "ddp", True),
        (2, "fsdp-sharded-factors", True),
        (4, "fsdp", False),
        pytest.param(4, "ddp", False, marks=pytest.mark.slow),
        pytest.param(2, "fsdp", True, marks=pytest.mark.slow),
        pytest.param(4, "fsdp-sharded-factors", True, marks=pytest.mark.slow),
    ],
)
def test_the_losses_of_one_process(tmp_path, alone, processes, mode, killed):
    output = torchrun(processes, mode, tmp_path, "--kill", fails=True) if killed else ""
    output += torchrun(processes, mode, tmp_path)
    steps = re.findall(r"step (\d) loss (\S+)", output)
    # each step once: the killed run goes on from its checkpoint, not from the start
    assert [int(step) for step, _ in steps] == list(range(STEPS))
    losses, model = alone
    assert [float(loss) for _, loss in steps] == pytest.approx(losses, rel=1e-5)

    resumed = fastspec.load_adapter(adapted(), tmp_path / str(STEPS))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert_close(q, p)

    numbers = sum(p.numel() for p in model.parameters())
    factors = sum(b.numel() for b in model.buffers())
    s = sum(layer.s.numel() for _, layer in spectral_layers(model))
    want = {
        "ddp": numbers + factors,
        "fsdp": numbers / processes + factors,
        "fsdp-sharded-factors": (numbers + factors - s) / processes + s,
    }[mode]
    assert held(output) == pytest.approx([want] * processes, rel=0.05)


def test_trainer_on_two_processes(tmp_path):
    """The losses of one, and the first process alone writes."""
    pytest.importorskip("transformers")
    import distributed_trainer

    one = distributed_trainer.trainer(str(tmp_path / "one"), 1)
    one.train()
    program = PROGRAM.with_name("distributed_trainer.py")
    output = torchrun(2, tmp_path / "two", program=program)
    got = [float(loss) for loss in re.findall(r"step \d loss (\S+)", output)]
    assert len(got) == distributed_trainer.STEPS
    assert got == pytest.approx(distributed_trainer.losses(one), rel=1e-4)
    writers = re.findall(r"rank (\d) writes \S*checkpoint-(\d)", output)
    assert writers == [("0", "2"), ("0", "4")]
    for folder in ("checkpoint-2", "checkpoint-4"):
        a, b = (load_file(tmp_path / n / folder / "adapter.safetensors") for n in ("one", "two"))
        for name in a:
            assert_close(b[name], a[name], torch.float16)


def test_factors_follow_weights_that_change(tmp_path):
    output = torchrun(2, tmp_path / "state", program=PROGRAM.with_name("distributed_weights.py"))
    cases = dict(line.split(": ") for line in output.splitlines() if ": " in line)
    assert cases.pop("sharded factors") == "0.0e+00 0 refused"
    assert cases.keys() == {"dcp.load", "set_model_state_dict", "DDP"}
    for name, numbers in cases.items():
        error, compared = map(float, numbers.split())
        assert error < 1e-4, name
        assert compared == 0, name  # step by step nothing is read


def test_sharded_factors_stay_out_of_files(tmp_path):
    model = shard_factors(adapted())
    assert model.state_dict().keys() == adapted().state_dict().keys()
    model.load_state_dict(adapted().state_dict())
    ids = batch(0, 0, 1)
    assert torch.equal(model(ids), adapted()(ids))
    fastspec.save_adapter(model, tmp_path)
    fastspec.load_adapter(adapted(), tmp_path)
    fastspec.load_adapter(model, tmp_path)


def test_refusals():
    with pytest.raises(ValueError, match="no adapter"):
        shard_factors(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is merged"):
        shard_factors(fastspec.merge(adapted()))
