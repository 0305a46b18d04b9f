"""The compiled parts: loaded where they serve, refused where they were built for something else."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastspec import _build, _extension

ROOT = Path(__file__).resolve().parent.parent
HERE = torch.__version__.partition("+")[0], sys.version.split()[0]


def stamp(torch_version: str, python: str) -> bytes:
    return b"\x7fELF\0fastspec built for torch %b, Python %b;\0" % (
        torch_version.encode(),
        python.encode(),
    )


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A folder of compiled parts, and the names of those that were loaded, where nothing can be built."""
    seen = []
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(_extension, "_known", {})
    monkeypatch.delenv("FASTSPEC_NO_EXT", raising=False)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: seen.append(Path(path).name))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("FASTSPEC_CACHE", str(tmp_path / "cache"))

    def fails(part, folder):
        raise _build.CannotBuildError("no compiler")

    monkeypatch.setattr(_build, "build_into", fails)
    return SimpleNamespace(folder=tmp_path, loaded=seen)


def test_each_device_loads_its_own_parts_once(parts):
    for name in ("_C.so", "_C_cuda.so"):
        (parts.folder / name).write_bytes(stamp(*HERE))
    assert _extension.unavailable_reason() is None
    assert _extension.unavailable_reason("_C_cuda") is None
    assert parts.loaded == []  # asking loads nothing
    for device, loaded in [("cpu", ["_C.so"]), ("cuda", ["_C.so", "_C_cuda.so"])]:
        for _ in range(2):
            assert _extension.serves(SimpleNamespace(device=torch.device(device)))
            assert parts.loaded == loaded
    assert not _extension.serves(SimpleNamespace(device=torch.device("xpu")))


def test_without_cuda_kernels_the_operators_still_serve(parts):
    (parts.folder / "_C.so").write_bytes(b"no stamp: of an earlier version")
    assert _extension.serves(SimpleNamespace(device=torch.device("cuda")))
    assert parts.loaded == ["_C.so"]
    assert _extension.unavailable_reason("_C_cuda") == "no compiler"


@pytest.mark.parametrize(
    ("built", "says"),
    [
        (("2.5.1", HERE[1]), "built for torch 2.5.1, this is"),
        ((HERE[0] + "0", HERE[1]), "built for torch"),
        ((HERE[0], "3.1.2"), "built for Python 3.1, this is"),
        ((HERE[0], "any"), None),
        ((HERE[0] + "a0+git", HERE[1]), None),
    ],
    ids=str,
)
def test_a_part_built_for_another_version_is_not_loaded(parts, built, says):
    (parts.folder / "_C.so").write_bytes(stamp(*built))
    serves = _extension.serves(torch.zeros(1))
    assert serves == (says is None) == bool(parts.loaded)
    assert serves or says in _extension.unavailable_reason()


def test_asking_what_is_there_leaves_the_first_use_its_build(parts, monkeypatch):
    """Also where the installation left word why it did not build, as an isolated one does."""
    (parts.folder / "_build.txt").write_text("_C: torch was not there at installation\n")
    built = []
    monkeypatch.setattr(_build, "build_into", lambda part, folder: built.append(part))
    reason = _extension.load(build=False)
    assert reason.startswith("torch was not there at installation; not built yet")
    assert not built
    _extension.serves(torch.zeros(1))
    assert built == ["_C"]


def test_a_failure_to_load_is_remembered(parts, monkeypatch):
    def fail(path):
        parts.loaded.append(path)
        raise OSError("undefined symbol: here")

    (parts.folder / "_C.so").touch()
    monkeypatch.setattr(torch.ops, "load_library", fail)
    for _ in range(3):
        assert not _extension.serves(torch.zeros(1))
        assert "undefined symbol: here" in _extension.unavailable_reason()
    assert len(parts.loaded) == 1


@pytest.mark.skipif(_extension.unavailable_reason() is not None, reason="csrc/ is not compiled")
def test_what_is_built_carries_its_stamp():
    built = _extension._BUILT_FOR.search((_extension._FOLDER / "_C.so").read_bytes())
    assert built is not None
    assert built.groups() == (HERE[0].encode(), None)  # no version of Python in particular


@pytest.mark.parametrize("library", [None, "damaged", "another torch"])
def test_a_checkout_that_was_not_installed(library, tmp_path):
    """`PYTHONPATH` alone: the layer, the SVD and, with Triton, every kernel module are there."""
    for name in ("fastspec", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.txt")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    if library:
        content = stamp("2.5.1", HERE[1]) if library == "another torch" else b"not a library"
        (tmp_path / "fastspec" / "_C.so").write_bytes(content)
    modules = ["launch", "tiles", "choice", "dispatch", "tma", "merge"]
    if importlib.util.find_spec("triton") is None:
        modules = ["launch", "tiles"]
    code = (
        "import torch, fastspec, fastspec.kernels\n"
        f"from fastspec.kernels import {', '.join(modules)}\n"
        "layer = fastspec.SpectralLinear(8, 6, rank=2)\n"
        "layer(torch.ones(3, 8)).sum().backward()\n"
        "assert fastspec.topk_svd(torch.eye(8), 2).converged\n"
        "print(fastspec.__file__, tiles.__file__, fastspec.backends()['extension'], sep='\\n')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "FASTSPEC_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    package, kernels, extension = run.stdout.splitlines()
    assert package == str(tmp_path / "fastspec" / "__init__.py")
    assert kernels == str(tmp_path / "kernels" / "tiles.py")
    wanted = {
        None: "(csrc) are not there",
        "damaged": "does not load",
        "another torch": "built for torch 2.5",
    }
    assert wanted[library] in extension
