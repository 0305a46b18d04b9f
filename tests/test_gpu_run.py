"""The run for a GPU (bench/gpu), rehearsed without one: every step, and what it does where steps go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from gpu import device, predict, record, run, tables, workers  # noqa: E402
from gpu.bars import Bar, bars  # noqa: E402

from fastspec import _extension  # noqa: E402

ROOT = Path(__file__).parents[1]
STEPS = [step.name for phase in run.PHASES for step in phase]
SLOW = ("build", "compiled", "glue")
QUICK = tuple(name for name in STEPS if name not in SLOW[1:])


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder of results of its own, and no trace of the caches that a run sets."""
    for name in ("FASTSPEC_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("FASTSPEC_GPU_OUT", str(tmp_path / "out"))
    monkeypatch.delenv("FASTSPEC_GPU_UNTIL", raising=False)
    return tmp_path / "out"


@pytest.mark.skipif(
    _extension.load(build=False) is not None, reason="the steps check what is compiled"
)
@pytest.mark.parametrize(
    "steps", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_a_rehearsal_of_every_step(out, steps):
    environment = {**os.environ, "FASTSPEC_GPU_REHEARSE": "1", "PYTHON": sys.executable}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    steps = [name for name in steps if name != "glue" or glue_files()]
    done = subprocess.run(
        ["bash", "bench/gpu/run.sh", *steps],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = json.loads((out / record.RESULTS).read_text())
    assert sorted(found["steps"]) == sorted(steps)
    assert all(rows for rows in found["steps"].values())
    assert not [row for rows in found["steps"].values() for row in rows.values() if "error" in row]
    assert len(list(out.iterdir())) <= 8
    last = done.stdout.splitlines()[-len(steps) :]
    assert {line.split("|")[1].strip() for line in last} == set(steps)
    assert all("| ok, " in line for line in last)
    text = tables.page([out / record.RESULTS])
    titles = {"layers": "Single layers", "tasks": "Many tasks", "svd": "Factorisations"}
    titles |= {"compiled": "Training steps, compiled", "glue": "GLUE"}
    assert all(title in text for step, title in titles.items() if step in steps)


def glue_files() -> bool:
    return "FASTSPEC_GLUE_DIR" in os.environ or (ROOT / "build/gpu/glue/SST-2").is_dir()


def command(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_step_that_goes_wrong_costs_itself_alone(out, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "bench")]))
    fails = "print('about to fail'); raise SystemExit(3)"
    writes = "from gpu.record import Record; Record('after').add('row', ms=1.5)"
    hangs = (
        "import subprocess, sys, time; from gpu.record import Record; Record('slow').add('first', x=1);"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    steps = [
        [run.Step("broken", 30, command(fails), needs=None)],
        [run.Step("rests", 30, command("print(1)"), needs="broken")],
        [
            run.Step("slow", 25, command(hangs), needs=None),
            run.Step("after", 30, command(writes), needs=None),
        ],
    ]
    began = time.time()
    assert run.main([], steps) == 1
    assert time.time() - began < 55
    printed = capsys.readouterr().out
    assert "[broken] about to fail" in printed
    log = (out / "run.log").read_text()
    for name, outcome in (("broken", "failed (3)"), ("slow", "over time"), ("after", "ok")):
        assert f"== {name}: {outcome}" in log
    assert "== rests: skipped: broken failed" in log
    found = record.read(out / record.RESULTS)["steps"]
    assert found == {"slow": {"first": {"x": 1}}, "after": {"row": {"ms": 1.5}}}


def test_named_steps_and_unknown_ones(out, capsys):
    steps = [[run.Step("one", 30, command("print('1')"), needs="two")], [run.Step("two", 30)]]
    assert run.main(["one"], steps) == 0  # what it rests on was not asked for
    assert run.main(["three"], steps) == 2
    assert "no step 'three'; the steps are: one two" in capsys.readouterr().err


def test_rows_survive_and_a_failure_is_a_row(out):
    rows = record.Record("layers")
    rows.add("a", ratio=1.25, bad=float("nan"), nested={"x": float("inf")})
    with rows.row("b"):
        raise ValueError("no such kernel")
    found = record.read()["steps"]["layers"]
    assert found == {
        "a": {"ratio": 1.25, "bad": "nan", "nested": {"x": "inf"}},
        "b": {"error": "ValueError: no such kernel"},
    }
    assert rows.status() == 1
    record.Record("layers").add("c", ratio=1.0)  # run again, it replaces what it found before
    assert list(record.read()["steps"]["layers"]) == ["c"]


def test_no_time_left_is_noted(out, monkeypatch):
    monkeypatch.setenv("FASTSPEC_GPU_UNTIL", str(time.time() + 5))
    rows = record.Record("steps")
    assert rows.enough(1, "short")
    assert not rows.enough(60, "long")
    assert record.read()["steps"]["steps"] == {"long": {"skipped": "no time left"}}


def test_a_worker_that_dies_or_is_poisoned_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "checks.py").write_text(
        "import os, time\n"
        "def check(index):\n"
        "    if index == 1: raise RuntimeError('CUDA error: an illegal memory access')\n"
        "    if index == 2: os._exit(7)\n"
        "    if index == 3: time.sleep(60)\n"
        "    return {'process': os.getpid()}\n"
    )
    paths = [str(tmp_path), str(ROOT), str(ROOT / "bench")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    found: dict[int, dict] = {}
    workers.run("checks", range(6), 1, 10, found.__setitem__)
    assert "illegal memory access" in found[1]["error"]
    assert "ended (7)" in found[2]["error"]
    assert "ended (-9)" in found[3]["error"]
    assert len({found[i]["process"] for i in (0, 4, 5)}) == 2  # the last two share one


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor(1.0),
    ],
)
def test_a_rehearsed_graph_refuses_what_a_capture_would(waits, monkeypatch):
    monkeypatch.setattr(device, "REHEARSING", True)
    x = torch.randn(4)
    with pytest.raises(RuntimeError, match="can't be captured"):
        device.graphed(lambda: waits(x))
    assert torch.equal(device.graphed(lambda: x * 2)(), 2 * x)


def test_bars_take_their_figures_from_the_rows():
    steps = {
        "layers": {"768->768 n=4096 k=32 diag bf16 step": {"chosen": {"ratio": 1.07}}},
        "steps": {
            "MiniLM 32x64 graphed": {"ratios": {"fastspec": 1.2, "PEFT LoRA r8": 1.5}},
            "MiniLM 32x64 memory": {
                "above_the_floor_mb": {"fastspec": 10.0},
                "p_of_all_layers_mb": 10.0,
            },
        },
        "svd": {
            "MiniLM k=32": {
                "compiled": True,
                "fastspec": {"ms": 2.0},
                "torch.linalg.svd": {"ms": 12.0},
                "svd_lowrank niter=4": {"ms": 1.5},
            }
        },
        "correctness": {"a": {"worst": 0.0}, "b": {"error": "off"}},
    }
    found = {bar.name: bar for bar in bars(steps)}
    verdicts = {
        "layer step over the frozen layer, 768->768 n=4096": "aim met",
        "step over the frozen floor, MiniLM 32x64, graphed": "missed",
        "PEFT LoRA r8 over ours, MiniLM 32x64, graphed": "aim met",
        "peak memory above the floor's over p of all layers, MiniLM 32x64": "aim met",
        "torch.linalg.svd over ours, MiniLM k=32": "met",
        "ours over svd_lowrank niter=4, MiniLM k=32": "met",
        "correctness: failures": "missed",
        "sanitizer: failures": "not measured",
    }
    assert {name: found[name].verdict for name in verdicts} == verdicts
    assert Bar("x", 1.0, 1, 1.2, least=True).verdict == "met"


def test_the_page_is_what_the_results_say():
    """docs/gpu.md holds the tables of the committed results, none by hand."""
    text = tables.page(sorted((ROOT / "bench/results/gpu").glob("*.json")))
    page = tables.PAGE.read_text()
    assert page.split(tables.BEGIN)[1].split(tables.END)[0].strip() == text.strip()


@pytest.mark.parametrize("load", predict.LOADS[:2], ids=lambda load: load.name)
def test_predictions_begin_where_a_card_has_measured(load):
    """What the third run measured comes out of the model, and every part that was built brings something."""
    measured = predict.measured()["steps"][load.floor]["ratios"]["fastspec, copies kept"]
    over = []
    for what in predict.CANDIDATES:
        floor, ms, bound = predict.step(load, what, predict.H200)
        over.append(ms / floor)
        assert bound
    assert abs(over[0] / measured - 1) < 0.05
    assert over == sorted(over, reverse=True)
    assert floor * 1e3 == pytest.approx(1e3 * predict.measured()["steps"][load.floor]["floor_ms"])


PARTS = """
import json
from gpu import device, networks

def beside(layers, name):
    rooms = [layer._kept.room for layer in layers]
    found = [(r.effective.untyped_storage().data_ptr(), getattr(r, name)) for r in rooms]
    return all(t is not None and t.untyped_storage().data_ptr() == whole for whole, t in found)

base, found = networks.base_of(networks.MINILM), {}
with device.as_on_card():
    for name, prepare in networks.PARTS.items():
        step = networks.make(prepare, base, networks.MINILM)
        for _ in range(2):
            step.loss().backward()
        layers = [layer for _, layer in networks.adapted(step.model)]
        state = networks.together._known.get(step.model)
        groups = None if state is None else len(state.sharing.groups)
        found[name] = [beside(layers, "vh"), beside(layers, "u"), groups]
print(json.dumps(found))
"""


@pytest.mark.skipif(_extension.load(build=False) is not None, reason="copies are joined by csrc/")
def test_parts_of_copies_are_what_they_say():
    """Each has its y and its dx joined, is made at once (else None) and shares inputs, as its name says."""
    environment = {**os.environ, "FASTSPEC_GPU_REHEARSE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    done = subprocess.run(
        command(PARTS), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "all": [True, True, 2],  # of two blocks
        "nothing shared": [True, True, 0],
        "dx joined, nothing shared": [False, True, 0],
        "y joined, nothing shared": [True, False, 0],
        "nothing joined": [False, False, 0],
        "nothing joined, each layer for itself": [False, False, None],
    }
