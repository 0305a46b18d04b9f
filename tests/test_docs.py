"""What the pages name is there: files, modules, public names, other pages."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FOLDERS = "examples|fastspec|kernels|csrc|tests|bench|tools|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_and_links(page):
    text = page.read_text()
    named = [ROOT / name for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)[`\s:]", text)]
    linked = [page.parent / name for name in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)]
    assert [str(p) for p in (*named, *linked) if not p.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_of_the_library(page):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    missing = []
    for dotted in sorted(set(re.findall(r"\bfastspec(?:\.[A-Za-z_]\w*)+", page.read_text()))):
        found, rest = importlib.import_module("fastspec"), dotted.split(".")[1:]
        for i, name in enumerate(rest, 2):
            if not hasattr(found, name):
                try:
                    importlib.import_module(".".join(dotted.split(".")[:i]))
                except ModuleNotFoundError:
                    missing.append(dotted)
                    break
            found = getattr(found, name)
    assert missing == []


def test_the_rooms_are_those_that_imports_are_held_to():
    from test_import_direction import ORDER

    section = (ROOT / "docs" / "index.md").read_text().split("\n## Rooms")[1].split("\n## ")[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    rooms = [tuple(re.findall(r"`([\w.]+)`", cell)) for cell in first]
    assert rooms == [r for r in ORDER if r != ("__main__",)]


def test_nobody_is_told_to_install_another_projects_package():
    """The index's `fastspec` is not this one: installation is from a checkout."""
    told = re.compile(r"pip install[^\n`]*\bfastspec\b")
    places = [*PAGES, ROOT / "setup.py", ROOT / "Makefile"]
    places += [p for room in ("fastspec", "kernels") for p in (ROOT / room).rglob("*.py")]
    assert [str(p) for p in places if told.search(p.read_text())] == []
