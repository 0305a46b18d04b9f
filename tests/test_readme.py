"""README.md: its Python runs, on a small model in place of the user's, and its times are current."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BENCHMARKS = README.parent / "docs" / "benchmarks.md"
RESULTS = README.parent / "docs" / "results.md"
METHODS = {
    "the head alone": "head",
    "coefficients, all directions": "coefficients",
    "band of half-width 1, all directions": "band",
    "band of half-width 4, attention's values and outputs": "band 4, values and outputs",
    "LoRA r1": "lora-r1",
    "LoRA r8": "lora-r8",
    "full finetuning": "full",
}


def test_its_times_are_those_of_the_benchmarks():
    times = README.read_text().split("## Measured")[1].split("**GLUE**")[0]
    rows = [line for line in times.splitlines() if line.startswith("|")]
    assert rows
    everything = BENCHMARKS.read_text().splitlines()
    assert [row for row in rows if row not in everything] == []


def table(text):
    """The lines of a Markdown table as dicts, by their first cell."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *lines = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    return {line[0]: dict(zip(map(str.lower, header), line, strict=True)) for line in lines}


def test_its_scores_are_those_of_the_results():
    shown = table(README.read_text().split("**GLUE**")[1].split("\n## ")[0])
    found = table(RESULTS.read_text().split("<!-- suite small -->")[1].split("<!-- end -->")[0])
    assert list(shown) == list(METHODS)
    for name, line in shown.items():
        measured = found[METHODS[name]]
        trained = line["trained beside the head"].split()[0]
        assert trained == measured["trained beside the head"].split()[0]
        columns = {"cola": "cola", "sst-2": "sst2", "rte": "rte", "mean": "mean", "step": "step"}
        for ours, theirs in {**columns, "saved activations": "saved"}.items():
            median = re.match(r"[\d.]*", measured[theirs])[0]
            assert re.match(r"[\d.]*", line[ours])[0] == median, (name, ours)


def test_the_blocks_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from peft import get_peft_model
    from tiny_models import bert

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
