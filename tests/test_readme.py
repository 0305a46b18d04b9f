"""README.md: its Python runs, on a small model in place of the user's, and its times are current."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BENCHMARKS = README.parent / "docs" / "benchmarks.md"


def test_its_times_are_those_of_the_benchmarks():
    times = README.read_text().split("## Measured")[1].split("**GLUE**")[0]
    rows = [line for line in times.splitlines() if line.startswith("|")]
    assert rows
    everything = BENCHMARKS.read_text().splitlines()
    assert [row for row in rows if row not in everything] == []


def test_the_blocks_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from peft import get_peft_model
    from test_tasks_models import bert

    import fastspec.peft

    monkeypatch.chdir(tmp_path)
    bert().save_pretrained("path/to/encoder")
    text = re.sub(r"\b(rank|r)=32", r"\1=4", README.read_text())
    first, second = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(first, str(README), "exec"), names)
    assert "trainable" in capsys.readouterr().out
    ids = torch.arange(30).view(3, 10)
    assert torch.allclose(names["fresh"].eval()(ids).logits, names["model"].eval()(ids).logits)

    fastspec.save_adapter(names["model"], "runs/cola")
    names |= {"batch": {"input_ids": ids}, "get_peft_model": get_peft_model}
    tasks, (peft_line,) = second.splitlines()[:-1], second.splitlines()[-1:]
    exec("\n".join(tasks), names)
    assert list(names["bank"]) == ["cola", "rte"]
    names["model"] = bert()  # PEFT takes the plain model
    exec(peft_line, names)
    assert names["peft_model"](ids).logits.shape[0] == 3
