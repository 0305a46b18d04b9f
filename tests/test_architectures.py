"""The checks of tools/architectures.py say what docs/architectures.md has."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import architectures

WRITTEN = architectures.written(architectures.PAGE.read_text())

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("name", architectures.KINDS)
def test_the_page_has_what_the_checks_say(name):
    said = architectures.table({name: architectures.row_of(name)}).splitlines()[2:]
    missing = [line for line in said if line and line not in WRITTEN.splitlines()]
    assert not missing, "python tools/architectures.py --write"


def test_the_page_has_no_other_rows():
    rows = [line.split("|")[1].strip() for line in WRITTEN.splitlines() if line.startswith("| ")]
    assert rows == ["architecture", *architectures.KINDS]


def test_as_much_works_as_is_claimed():
    rows = [line.split("|")[2:-1] for line in WRITTEN.splitlines() if line.startswith("| ")][1:]
    columns = dict(zip(architectures.CHECKS, zip(*rows, strict=False), strict=True))
    worked = {name: sum(cell.strip() != "no" for cell in cells) for name, cells in columns.items()}
    assert len(rows) >= 67
    assert worked["starts equal"] >= 66
    assert worked["mixed tasks"] >= 64
    assert worked["PEFT"] >= 64
