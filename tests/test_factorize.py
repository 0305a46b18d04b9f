"""`fastspec factorize` and the basis files it writes."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastspec.cli import main
from fastspec.files import join_safetensors
from fastspec.fingerprint import tensor_fingerprint
from fastspec.svd import cli
from fastspec.svd.basis_file import BasisError, load_basis
from fastspec.svd.topk import topk_svd


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Two shards: square and oblong matrices, one in bf16, a bias, an embedding and a head."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "layer.0.query.weight": torch.randn(24, 24, generator=g),
        "layer.1.query.weight": torch.randn(24, 24, generator=g),
        "layer.0.up.weight": torch.randn(40, 24, generator=g),
        "layer.1.up.weight": torch.randn(40, 24, generator=g).bfloat16(),
        "layer.0.tiny.weight": torch.randn(3, 24, generator=g),
        "layer.0.query.bias": torch.randn(24, generator=g),
        "word_embeddings.weight": torch.randn(50, 24, generator=g),
        "classifier.weight": torch.randn(2, 24, generator=g),
    }
    folder = tmp_path / "model"
    folder.mkdir()
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, folder / "a.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, folder / "b.safetensors")
    return folder, tensors


def check(path: Path, tensors: dict[str, torch.Tensor], rank: int) -> None:
    basis = load_basis(path)
    wanted = {n for n in tensors if n.startswith("layer") and n.endswith("weight")}
    assert {f"{n}.weight" for n in basis} == wanted
    for name, entry in basis.items():
        w = tensors[f"{name}.weight"]
        k = min(rank, *w.shape)
        assert entry.fingerprint == tensor_fingerprint(w)
        assert basis.find(w) is entry
        assert entry.residual <= 1e-5
        assert entry.u.dtype == entry.vh.dtype == w.dtype
        assert (entry.u.shape, entry.s.shape, entry.vh.shape) == (
            (w.shape[0], k),
            (k,),
            (k, w.shape[1]),
        )
        alone = topk_svd(w, k)
        assert torch.allclose(entry.s, alone.s, rtol=1e-6)
        assert torch.allclose(entry.u.float(), alone.u.float(), atol=1e-2 if k < 24 else 1)
    assert basis.find(torch.zeros(24, 24)) is None
    assert not list(path.parent.glob("*.parts"))
    assert not list(path.parent.glob("*.tmp"))


def test_file(checkpoint, tmp_path: Path) -> None:
    folder, tensors = checkpoint
    out = tmp_path / "basis.safetensors"
    assert main(["factorize", str(folder), "--rank", "6", "-o", str(out)]) == 0
    check(out, tensors, 6)
    entry = load_basis(out)["layer.0.up"]
    transposed = entry.transposed()
    assert torch.equal(transposed.u, entry.vh.mT)
    assert torch.equal(transposed.vh, entry.u.mT)


def test_fraction_full_and_patterns(checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint
    out = tmp_path / "b.safetensors"
    common = ["factorize", str(folder), "-o", str(out)]
    assert main([*common, "--rank", "0.25", "--include", "up", "--dtype", "float32"]) == 0
    basis = load_basis(out)
    assert set(basis) == {"layer.0.up", "layer.1.up"}
    assert all(e.s.shape == (6,) and e.u.dtype == torch.float32 for e in basis.values())
    assert main([*common, "--rank", "full", "--exclude", r"layer\.1|emb|class"]) == 0
    assert load_basis(out)["layer.0.tiny"].s.shape == (3,)


def test_resumes_where_it_was_stopped(checkpoint, tmp_path: Path, monkeypatch) -> None:
    folder, tensors = checkpoint
    out = tmp_path / "basis.safetensors"
    done: list[str] = []

    def stop_at_second(weights, k, *, names, **rest):
        if done:
            raise KeyboardInterrupt
        done.extend(names)
        return topk_svd(weights, k, names=names, **rest)

    monkeypatch.setattr(cli, "topk_svd", stop_at_second)
    command = ["factorize", str(folder), "--rank", "6", "-o", str(out)]
    assert main(command) == 130
    assert not out.exists()
    again: list[str] = []

    def record(weights, k, *, names, **rest):
        again.extend(names)
        return topk_svd(weights, k, names=names, **rest)

    monkeypatch.setattr(cli, "topk_svd", record)
    assert main(command) == 0
    assert done
    assert not set(done) & set(again)
    assert len(done) + len(again) == 5
    check(out, tensors, 6)


def test_parts_of_another_request_are_not_used(checkpoint, tmp_path: Path, monkeypatch) -> None:
    folder, tensors = checkpoint
    out = tmp_path / "basis.safetensors"
    monkeypatch.setattr(cli, "join_parts", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["factorize", str(folder), "--rank", "4", "-o", str(out)]) == 130
    part = next(iter((tmp_path / "basis.safetensors.parts").iterdir()))
    part.write_bytes(part.read_bytes()[:100])
    monkeypatch.undo()
    assert main(["factorize", str(folder), "--rank", "6", "-o", str(out)]) == 0
    check(out, tensors, 6)


def test_torchrun_divides_the_matrices(checkpoint, tmp_path: Path) -> None:
    folder, tensors = checkpoint
    out = tmp_path / "basis.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "fastspec", "factorize", str(folder), "--rank", "6", "-o", str(out)]
    subprocess.run(
        [*launch, *command],
        check=True,
        timeout=120,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    check(out, tensors, 6)


def test_errors(checkpoint, tmp_path: Path, capsys) -> None:
    folder, _ = checkpoint
    out = str(tmp_path / "b.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no such file format")
    save_file({"a.weight": torch.full((4, 4), float("nan"))}, tmp_path / "nan.safetensors")
    for model, message, *more in (
        (empty, "holds no .safetensors file"),
        (broken, "not a readable safetensors file"),
        (tmp_path / "nan.safetensors", "non-finite values in a.weight"),
        (folder, "no weight matrix", "--include", "nothing"),
    ):
        assert main(["factorize", str(model), "--rank", "2", "-o", out, *more]) == 2
        assert message in capsys.readouterr().err
    assert not os.path.exists(out)
    for rank in ("0", "1.5", "x"):
        with pytest.raises(SystemExit):
            main(["factorize", str(folder), "--rank", rank, "-o", out])


def test_unreadable_basis_files(checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint
    out = tmp_path / "basis.safetensors"
    main(["factorize", str(folder), "--rank", "2", "-o", str(out)])
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BasisError, match="not a readable basis file"):
        load_basis(out)
    with pytest.raises(BasisError, match="no fastspec metadata"):
        load_basis(folder / "a.safetensors")
    out.write_bytes(whole.replace(b'\\"format\\": 2', b'\\"format\\": 9'))
    with pytest.raises(BasisError, match="basis format 9"):
        load_basis(out)


def test_what_is_no_basis_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link", "."):
        with pytest.raises(BasisError, match="is not a regular file"):
            load_basis(tmp_path / name)
    with pytest.raises(BasisError, match="can't be the name of a file"):
        load_basis("a\0b")
    with pytest.raises(FileNotFoundError):
        load_basis(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "header", ["[" * 100_000, "1" * 10_000, '{"format": "%s"}' % ("y" * 10_000)]
)
def test_metadata_of_a_basis_that_is_no_use(tmp_path: Path, header: str) -> None:
    path = tmp_path / "basis.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"fastspec": header})
    with pytest.raises(BasisError) as error:
        load_basis(path)
    assert len(str(error.value)) < 600


def test_a_basis_whose_metadata_or_shapes_are_wrong_names_the_weight(checkpoint, tmp_path) -> None:
    folder, _ = checkpoint
    out = tmp_path / "basis.safetensors"
    main(["factorize", str(folder), "--rank", "2", "-o", str(out)])
    tensors = load_file(out)
    with safe_open(out, framework="pt") as f:
        header = json.loads(f.metadata()["fastspec"])

    def spoil(message: str, module: str, change: dict, **replaced: torch.Tensor) -> None:
        about = {**header["weights"][module], **change}
        about = {key: value for key, value in about.items() if value is not None}
        weights = header["weights"] | {module: about}
        changed = tensors | {f"{module}.{key}": t for key, t in replaced.items()}
        metadata = {"fastspec": json.dumps(header | {"weights": weights})}
        save_file(changed, tmp_path / "spoilt.safetensors", metadata)
        with pytest.raises(BasisError, match=message):
            load_basis(tmp_path / "spoilt.safetensors")

    for key in ("fingerprint", "residual", "shape"):
        spoil(
            "layer.0.up must have a fingerprint, a residual and a shape", "layer.0.up", {key: None}
        )
    spoil(r"layer.0.up.u must have shape \(40, 2\)", "layer.0.up", {}, u=torch.zeros(24, 2))
    spoil(r"layer.0.up.vh must have shape \(2, 24\)", "layer.0.up", {}, vh=torch.zeros(24, 2))
    spoil(r"layer.0.up.s must have shape \(2,\)", "layer.0.up", {}, s=torch.zeros(1, 2))
    spoil(r"layer.1.up.u must have shape \(41, 2\)", "layer.1.up", {"shape": [41, 24]})


def test_joined_files_are_what_safetensors_would_have_written(tmp_path: Path) -> None:
    """Odd counts of 16 bits among wider ones, an empty tensor, one that is left out."""
    a = {"x": torch.randn(3, 5).bfloat16(), "s": torch.randn(3), "left out": torch.ones(2)}
    b = {"x": torch.randn(7).half(), "s": torch.randn(2, 2).double(), "none": torch.empty(0, 4)}
    first, second, out = (tmp_path / name for name in ("a", "b", "out"))
    save_file(a, first)
    save_file(b, second)
    chosen = {"a.x": (first, "x"), "a.s": (first, "s")}
    chosen |= {f"b.{key}": (second, key) for key in b}
    join_safetensors(out, chosen, {"about": "these"})
    wanted = {"a.x": a["x"], "a.s": a["s"], **{f"b.{key}": value for key, value in b.items()}}
    found = load_file(out)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(out, framework="pt") as f:
        assert f.metadata() == {"about": "these"}


# a process of its own, whose peak memory nothing before has raised
JOIN = """
import sys
from pathlib import Path
from fastspec.files import join_safetensors

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

parts = sorted(Path(sys.argv[1]).glob("*.safetensors"))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = status("VmRSS")
join_safetensors(sys.argv[2], {p.stem: (p, "u") for p in parts}, {})
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_joining_holds_no_part_in_memory(tmp_path: Path) -> None:
    size = 8 << 20
    for i in range(6):
        save_file({"u": torch.full((size // 4,), float(i))}, tmp_path / f"{i}.safetensors")
    out = tmp_path / "joined"
    run = subprocess.run(
        [sys.executable, "-c", JOIN, str(tmp_path), str(out)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stat().st_size > 6 * size
    assert int(run.stdout) < size


# the whole command, after a first one that loads what it needs
FACTORIZE = """
import sys
from fastspec.cli import main

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

small, large, out, memory = sys.argv[1:]
common = ["--rank", "4", "--tol", "1e-3", "--memory", memory]
assert main(["factorize", small, "-o", out + "-small", *common]) == 0
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = status("VmRSS")
assert main(["factorize", large, "-o", out, *common]) == 0
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_larger_than_the_memory_it_may_take(tmp_path: Path) -> None:
    """The model is one file of 128 MiB, the bound 48 MiB: it is not even mapped whole."""
    side, count = 1024, 32
    g = torch.Generator().manual_seed(0)

    def weight(n: int) -> torch.Tensor:
        u, v = (torch.linalg.qr(torch.randn(n, 8, generator=g))[0] for _ in range(2))
        return u @ torch.diag(2.0 ** -torch.arange(8.0)) @ v.T

    save_file({"small.weight": weight(512)}, tmp_path / "small.safetensors")
    weights = {f"layers.{i}.weight": weight(side) for i in range(count)}
    save_file(weights, tmp_path / "large.safetensors")
    files = [str(tmp_path / name) for name in ("small.safetensors", "large.safetensors", "out")]
    bound = 48 << 20
    run = subprocess.run(
        [sys.executable, "-c", FACTORIZE, *files, str(bound / 2**30)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert len(load_basis(tmp_path / "out")) == count
    assert (tmp_path / "large.safetensors").stat().st_size > 2 * bound
    rest = (
        8 << 20
    )  # of the process itself, which swings by some MiB: the interpreter's and the allocator's
    assert int(run.stdout.splitlines()[-1]) < bound + rest


def test_progress_counts_every_matrix_once(checkpoint, tmp_path: Path, monkeypatch) -> None:
    """Those that an earlier run left as parts too."""
    folder, _ = checkpoint
    command = ["factorize", str(folder), "--rank", "2", "-o", str(tmp_path / "b.safetensors")]
    monkeypatch.setattr(cli, "join_parts", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*command, "--include", "up"]) == 130
    monkeypatch.undo()
    totals, advances = [], []

    class Bar:
        def __init__(self, *, total: int, **rest) -> None:
            totals.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *raised) -> None: ...

        def update(self, count: int) -> None:
            advances.append(count)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    assert main(command) == 0
    assert totals == [5]
    assert sum(advances) == 5
    assert len(advances) > 1


def test_ranks_wait_for_one_another_for_days(monkeypatch) -> None:
    import torch.distributed as dist

    asked: dict = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: asked.update(options)
    )
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with cli._ranks() as (rank, world, _):
        assert (rank, world) == (1, 2)
    assert asked["timeout"] >= datetime.timedelta(days=7)
