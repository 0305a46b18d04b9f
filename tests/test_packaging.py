"""What installing and importing promise: lean, optional parts optional, nothing missing from the wheel."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension

import fastspec
from fastspec import _build

ROOT = Path(__file__).resolve().parent.parent


def python(code, *args, **kw):
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, **kw
    ).stdout


def loaded_by(code):
    """(modules that the code loads beside torch's own, whether it touched CUDA)."""
    out = python(
        "import sys, json, torch; before = set(sys.modules)\n"
        f"{code}\n"
        "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))"
    )
    modules, cuda = json.loads(out)
    return modules, cuda


def test_import_loads_nothing_else():
    assert loaded_by("import fastspec") == (["fastspec"], False)


def test_the_core_loads_neither_optional_libraries_nor_the_rooms_above_it():
    names = "fastspec.SpectralLinear, fastspec.spectralize, fastspec.save_adapter"
    modules, cuda = loaded_by(f"import fastspec; {names}")
    ours = {m.split(".")[1] for m in modules if m.startswith("fastspec.")}
    assert {"nn", "ops", "svd", "model"} <= ours
    assert not {"multitask", "peft", "studies", "cli"} & ours
    assert not [
        m for m in modules if m.startswith("fastspec.kernels.")
    ]  # its rank limit alone is read
    assert {m.split(".")[0] for m in modules} == {"fastspec", "safetensors"}
    assert not cuda


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
        "m = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "fastspec.spectralize(m, fastspec.SpectralConfig(rank=2))\n"
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
def sources(tmp_path_factory):
    """A copy of the checkout's sources, so that building leaves nothing in it."""
    copy = tmp_path_factory.mktemp("sources") / "fastspec"
    code = ("fastspec", "kernels", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    # so that a wheel without them is the build's doing
    keep = (*code, "tools", "tests", "bench")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build.txt")
    copy.mkdir()
    for name in keep:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=ignore)
        else:
            shutil.copy(path, copy)
    return copy


def small_sources(sources, tmp_path):
    """The sources with a C++ part that compiles at once."""
    built = shutil.ignore_patterns("build", "*.egg-info")  # by other tests, of the whole csrc
    copy = shutil.copytree(sources, tmp_path / "sources", ignore=built)
    shutil.rmtree(copy / "csrc")
    (copy / "csrc").mkdir()
    (copy / "csrc" / "one.cpp").write_text('extern "C" int fastspec_one() { return 1; }\n')
    return copy


def build_wheel(sources, folder, **environment):
    """The folder a wheel of the sources unpacks to."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"),
            *("-w", str(folder), str(sources)),
        ],
        check=True,
        env={**os.environ, **environment},
    )
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def installed(sources, tmp_path_factory):
    return build_wheel(sources, tmp_path_factory.mktemp("wheel"), FASTSPEC_NO_EXT="1")


def reason(site, cwd):
    return python(
        "import sys; sys.path.insert(0, sys.argv[1]); import fastspec\n"
        "for part in ('extension', 'extension_cuda'):\n"
        "    b = fastspec.backends()[part]; print(part, b.available, b.detail)",
        str(site),
        cwd=cwd,
    ).splitlines()


def test_a_skipped_build_says_so(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSPEC_CACHE", str(tmp_path))
    for line in reason(installed, tmp_path):
        assert "False skipped at installation by FASTSPEC_NO_EXT=1" in line


def test_a_failing_compiler_leaves_a_working_library_and_its_reason(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("CC", "/bin/false")
    site = build_wheel(sources, tmp_path)
    for line in reason(site, tmp_path):
        assert "False the build failed" in line
    out = python(
        "import sys; sys.path.insert(0, sys.argv[1]); import fastspec, torch\n"
        "layer = fastspec.SpectralLinear(8, 6, rank=2); layer(torch.ones(3, 8)).sum().backward()\n"
        "print(layer.delta.grad.shape)",
        str(site),
        cwd=tmp_path,
    )
    assert "torch.Size([2])" in out
    # tried again at first use, in vain, and remembered: the next process does not compile
    (failure,) = (tmp_path / "cache").rglob("_C.failed")
    assert "the build failed" in failure.read_text()
    assert "the build failed" in reason(site, tmp_path)[0]


FIRST_USE = (
    "import sys; sys.path.insert(0, sys.argv[1]); import torch, fastspec\n"
    "from fastspec import _extension\n"
    "_extension.load()\n"  # as the first operator does
    "print(_extension.unavailable_reason())"
)


def test_what_was_not_built_is_compiled_once_at_first_use(sources, tmp_path):
    """Two processes at once: one compiles, with one line before and one after, the other waits."""
    copy = small_sources(sources, tmp_path)
    site = build_wheel(copy, tmp_path, FASTSPEC_NO_EXT="1")
    assert not list(site.rglob("*.so"))
    environment = {**os.environ, "FASTSPEC_CACHE": str(tmp_path / "cache")}
    asked = python(
        FIRST_USE.replace("_extension.load()", ""), str(site), cwd=tmp_path, env=environment
    )
    assert "not built yet" in asked
    assert not (tmp_path / "cache").exists()  # a question builds nothing
    command = [sys.executable, "-c", FIRST_USE, str(site)]
    both = [
        subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment, cwd=tmp_path)
        for _ in range(2)
    ]
    ended = [process.communicate() for process in both]
    said = "".join(err for _, err in ended)
    assert [out.strip() for out, _ in ended] == ["None", "None"], said
    assert said.count("compiling _C once") == 1
    assert said.count("_C compiled in") == 1
    again = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert (again.stdout.strip(), again.stderr) == ("None", "")
    forbidden = {**environment, "FASTSPEC_NO_EXT": "1"}
    told = subprocess.run(
        command, capture_output=True, text=True, check=True, env=forbidden, cwd=tmp_path
    )
    assert "switched off by FASTSPEC_NO_EXT=1" in told.stdout


def test_the_build_command_compiles_ahead_of_time(sources, tmp_path):
    site = build_wheel(small_sources(sources, tmp_path), tmp_path, FASTSPEC_NO_EXT="1")
    environment = {
        **os.environ,
        "FASTSPEC_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(site),
    }
    command = [sys.executable, "-m", "fastspec", "build", "--part", "_C"]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert run.stdout.startswith("_C: built in")
    assert len(list((tmp_path / "cache").rglob("_C.so"))) == 1
    failed = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**environment, "CXX": "/bin/false"},
        cwd=tmp_path,
    )
    assert failed.returncode == 1
    assert "_C: not built: the build failed" in failed.stdout


def test_a_source_distribution_holds_what_it_builds_from(sources, tmp_path):
    subprocess.run(
        [sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('out')"],
        check=True,
        cwd=shutil.copytree(sources, tmp_path / "copy"),
        env={**os.environ, "FASTSPEC_NO_EXT": "1"},
        capture_output=True,
    )
    (archive,) = (tmp_path / "copy" / "out").glob("fastspec_torch-*.tar.gz")
    with tarfile.open(archive) as tar:
        have = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("fastspec", "kernels", "csrc"):
        for file in (sources / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".cu", ".h"):
                assert file.relative_to(sources).as_posix() in have


@pytest.mark.slow
def test_an_isolated_installation_ends_with_the_compiled_part(sources, tmp_path):
    """pip's default: the build environment has no torch; the first use compiles all of csrc."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*command, str(sources)], check=True)
    out = python(
        "import sys; sys.path.insert(0, sys.argv[1]); import torch, fastspec\n"
        "found = fastspec.topk_svd(torch.randn(3, 96, 64), 8)\n"
        "layer = fastspec.SpectralLinear(8, 6, rank=2); layer(torch.ones(3, 8)).sum().backward()\n"
        "print(fastspec.__file__); print(bool(found.converged.all())); print(fastspec.backends())",
        str(site),
        cwd=tmp_path,
        env={**os.environ, "FASTSPEC_CACHE": str(tmp_path / "cache")},
    )
    assert out.startswith(str(site))
    assert "True" in out
    assert "extension      yes" in out


def test_wheel_holds_every_module_and_no_top_level_kernels(installed):
    have = {p.relative_to(installed).as_posix() for p in installed.rglob("*.py")}
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastspec").rglob("*.py")}
    expected |= {
        "fastspec/" + p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")
    }
    assert have == expected
    assert (installed / "fastspec" / "py.typed").exists()
    above = {p.name for p in installed.iterdir()}
    assert {n for n in above if not n.endswith(".dist-info")} == {"fastspec"}


def test_pyproject_lists_every_package_folder():
    """Also a new one whose wheel no one has built yet."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 on")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = ["fastspec.csrc", "fastspec.kernels"]
    for folder, _, files in os.walk(ROOT / "fastspec"):
        if any(name.endswith(".py") for name in files):
            found.append(".".join(Path(folder).relative_to(ROOT).parts))
    assert sorted(listed) == sorted(found)


def test_installed_package_works_outside_the_repository(installed, tmp_path):
    out = python(
        "import sys; sys.path.insert(0, sys.argv[1]); import fastspec, fastspec.kernels, importlib.util\n"
        "print(fastspec.__file__); print(importlib.util.find_spec('kernels'))",
        str(installed),
        cwd=tmp_path,
    )
    assert str(installed) in out
    assert "None" in out


def test_a_wheel_built_with_a_compiler_holds_the_library(sources, tmp_path):
    """Of a source that compiles at once: what is in it does not matter here."""
    site = build_wheel(small_sources(sources, tmp_path), tmp_path)
    assert (site / "fastspec" / "_C.so").exists()
    cpu, _ = reason(site, tmp_path)
    assert cpu.startswith("extension True")


@pytest.fixture
def cuda_torch(monkeypatch):
    """A torch with CUDA on a machine with nvcc and no GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = "sm_120 sm_75 sm_80 sm_90 sm_90a sm_100f compute_120"
    monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: flags, raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")


@pytest.mark.usefixtures("cuda_torch")
def test_without_a_gpu_the_cuda_part_is_built_for_what_torch_was():
    part = _build.extension("_C_cuda", ["csrc/jacobi.cu"])
    assert part.name == "fastspec._C_cuda"
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;9.0;10.0;12.0+PTX"
    flags = torch.utils.cpp_extension._get_cuda_arch_flags()
    assert "-gencode=arch=compute_120,code=compute_120" in flags
    assert len(flags) == 6


@pytest.mark.usefixtures("cuda_torch")
def test_the_architectures_asked_for_are_kept(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    _build.extension("_C_cuda", ["csrc/jacobi.cu"])
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0a"


@pytest.mark.usefixtures("cuda_torch")
def test_a_visible_gpu_decides_for_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _build.extension("_C_cuda", ["csrc/jacobi.cu"])
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ


@pytest.mark.usefixtures("cuda_torch")
@pytest.mark.parametrize("lacks", ["CUDA in torch", "nvcc"])
def test_what_the_cuda_part_lacks_is_said(monkeypatch, lacks):
    if lacks == "nvcc":
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    else:
        monkeypatch.setattr(torch.version, "cuda", None)
    why = "nvcc was not found" if lacks == "nvcc" else "without CUDA"
    with pytest.raises(_build.CannotBuildError, match=why):
        _build.extension("_C_cuda", ["csrc/jacobi.cu"])
