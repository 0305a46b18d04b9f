"""The code of docs/serving.md runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from tasks_support import random_values
from tiny_models import bert

import fastspec
from fastspec import SpectralConfig, spectralize

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"


def test_the_page_runs_top_to_bottom(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    bert().save_pretrained("path/to/encoder")
    model = spectralize(bert(), SpectralConfig(rank=4))
    bank = fastspec.task_bank(model)
    for seed, (name, labels) in enumerate({"rte": 2, "mnli": 3}.items()):
        fastspec.add_task(model, name, random_values(bank, seed, labels=labels))
        fastspec.set_task(model, name)
        fastspec.save_adapter(model, f"runs/{name}")

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) >= 7
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        if "same" in names:
            assert torch.equal(names.pop("same"), names["logits"])
    assert capsys.readouterr().out.splitlines()[-1] == "['mnli', 'rte', 'cola']"
    assert torch.isneginf(names["logits"][0, 2])
    assert sorted(p.name for p in Path("runs").iterdir()) == ["cola", "mnli", "rte"]
