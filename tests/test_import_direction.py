"""Each room of the code imports only rooms below it, at the top of a file or inside a function."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The lowest first. Rooms of one line do not know each other.
ORDER = (
    ("cores", "files", "fingerprint", "precision", "progress", "_build"),
    ("config", "_extension"),
    ("availability", "build", "kernels"),
    ("ops", "svd"),
    ("nn",),
    ("model",),
    ("multitask", "peft"),
    ("studies.core_maps", "studies.csv_record", "studies.documentation", "studies.encoders"),
    ("studies.glue",),
    ("studies.analyze", "studies.decoder"),
    ("studies.commands",),
    ("cli", "__init__"),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below `fastspec`; kernels/ stands beside it."""
    found = {}
    for folder, prefix in ((ROOT / "fastspec", ()), (ROOT / "kernels", ("kernels",))):
        for file in folder.rglob("*.py"):
            parts = (*prefix, *file.relative_to(folder).with_suffix("").parts)
            if parts[-1] == "__init__" and len(parts) > 1:
                parts = parts[:-1]
            found[".".join(parts)] = file
    return found


MODULES = modules()


def room(module: str) -> str:
    """The entry of `ORDER` that a module belongs to; each study is a room of its own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "studies" and len(parts) > 1 else parts[0]


def imports(file: Path) -> Iterator[str]:
    """The modules of the package that a file names in its imports, type checking's left out."""
    tree = ast.parse(file.read_text())
    for branch in ast.walk(tree):
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING":
            branch.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{file}: a relative import hides the room it names"
            assert node.level == 0, f"{file}: a relative import hides the room it names"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] != "fastspec":
                continue
            below = name.split(".")[1:]
            while below and ".".join(below) not in MODULES:
                below.pop()
            yield ".".join(below) or "__init__"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    here = room(module)
    for target in imports(MODULES[module]):
        there = room(target)
        # `import fastspec` names the facade, which loads a room on first use
        if there not in (here, "__init__"):
            assert RANK[there] < RANK[here], (
                f"{module} imports {target}: {there} is not below {here}"
            )


def test_every_room_has_its_place() -> None:
    rooms = {room(m) for m in MODULES} - {"studies"}  # whose own file holds one docstring
    assert rooms == set(RANK)
