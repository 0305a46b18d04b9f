"""What installing and importing promise: lean, optional parts optional, nothing missing from the wheel."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastspec

ROOT = Path(__file__).resolve().parent.parent


def python(code, *args, **kw):
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, **kw
    ).stdout


def test_import_is_lean():
    """Importing adds no library beyond torch's own, touches no CUDA, and is quick beside torch."""
    out = python(
        "import sys, time, json, torch; before = set(sys.modules); t = time.perf_counter()\n"
        "import fastspec; t = time.perf_counter() - t\n"
        "added = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(json.dumps([t, sorted(added), torch.cuda.is_initialized()]))"
    )
    seconds, added, cuda = json.loads(out)
    assert seconds < 0.150
    assert not {"transformers", "triton", "peft", "datasets", "sklearn", "scipy"} & set(added)
    assert not cuda


def test_whole_public_surface_is_quick_to_load():
    out = python(
        "import torch, time; t = time.perf_counter()\n"
        "import fastspec; fastspec.SpectralLinear; fastspec.spectralize; fastspec.save_adapter\n"
        "print(time.perf_counter() - t)"
    )
    assert float(out) < 0.5


@pytest.mark.parametrize("missing", ["triton", "transformers", "tqdm", "peft", "datasets"])
def test_core_works_without_optional_libraries(missing):
    out = python(
        "import sys, importlib.util, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {missing!r}: raise ImportError('blocked: ' + name)\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda n, *a: None if n == {missing!r} else find(n, *a)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import torch, fastspec\n"
        "m = fastspec.spectralize(torch.nn.Sequential(torch.nn.Linear(8, 8)), fastspec.SpectralConfig(rank=2))\n"
        "m(torch.randn(3, 8)).sum().backward(); print(m[0].delta.grad.shape); print(fastspec.backends())"
    )
    assert "torch.Size([2])" in out
    if missing != "tqdm":
        assert f"{missing}" in out
        assert "not installed" in out


def test_public_names_resolve():
    pytest.importorskip("transformers")
    for name in fastspec.__all__:
        assert getattr(fastspec, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fastspec.nonsense  # noqa: B018


def test_command_line():
    for command in ([], ["glue"], ["factorize"], ["backends"]):
        run = subprocess.run(
            [sys.executable, "-m", "fastspec", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "usage: fastspec" in run.stdout
    out = subprocess.run(
        [sys.executable, "-m", "fastspec", "backends"], capture_output=True, text=True, check=True
    )
    assert "aten" in out.stdout
    version = subprocess.run(
        [sys.executable, "-m", "fastspec", "--version"], capture_output=True, text=True, check=True
    )
    assert fastspec.__version__ in version.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "fastspec", "nonsense"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "invalid choice" in wrong.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel built from the sources, and the folder it unpacks to."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True, env={**__import__("os").environ, "FASTSPEC_NO_EXT": "1"},
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_wheel_holds_every_module_and_no_top_level_kernels(installed):
    have = {p.relative_to(installed).as_posix() for p in installed.rglob("*.py")}
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastspec").rglob("*.py")}
    expected |= {
        "fastspec/" + p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")
    }
    assert have == expected
    assert (installed / "fastspec" / "py.typed").exists()
    assert not (installed / "kernels").exists()


def test_installed_package_works_outside_the_repository(installed, tmp_path):
    out = python(
        "import sys; sys.path.insert(0, sys.argv[1]); import fastspec, fastspec.kernels, importlib.util\n"
        "print(fastspec.__file__); print(importlib.util.find_spec('kernels'))",
        str(installed),
        cwd=tmp_path,
    )
    assert str(installed) in out
    assert "None" in out
