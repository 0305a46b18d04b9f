"""Basis files and parts that are damaged, mixed up, or of another run: refused or made anew, never used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastspec import SpectralConfig, spectralize
from fastspec.cli import main
from fastspec.svd import cli, parts
from fastspec.svd.basis_file import BasisError, entry_digest, load_basis

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def weights(out: int, inside: int, count: int = 2, dtype=torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    names = [f"layer.{i}.weight" for i in range(count)]
    return {name: torch.randn(out, inside, generator=g).to(dtype) for name in names}


def factorized(folder: Path, tensors: dict[str, Tensor], *options: str, rank: str = "2") -> Path:
    save_file(tensors, folder / "model.safetensors")
    out = folder / "basis.safetensors"
    command = ["factorize", str(folder / "model.safetensors"), "--rank", rank, "-o", str(out)]
    assert main([*command, *options]) == 0
    return out


def rewritten(path: Path, change, *, digests: str) -> Path:
    """The file with tensors and metadata as `change` leaves them; digests are "kept", "renewed" or "none"."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as f:
        header = json.loads(f.metadata()["fastspec"])
    change(tensors, header["weights"])
    for name, about in header["weights"].items():
        if digests == "none":
            del about["digest"]
        elif digests == "renewed":
            factors = {key: tensors[f"{name}.{key}"] for key in ("u", "s", "vh")}
            about["digest"] = entry_digest(about["fingerprint"], about["residual"], factors)
    header["format"] = 1 if digests == "none" else 2
    out = path.with_name("changed.safetensors")
    save_file(tensors, out, {"fastspec": json.dumps(header)})
    return out


def test_no_flipped_bit_changes_a_basis_in_silence(tmp_path: Path) -> None:
    path = factorized(tmp_path, weights(4, 3))
    whole, right = path.read_bytes(), load_basis(path)
    flipped = tmp_path / "flipped.safetensors"
    refused = 0
    for at in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[at] ^= 1 << bit
            flipped.write_bytes(data)
            try:
                found = load_basis(flipped)
            except BasisError:
                refused += 1
                continue
            assert list(found) == list(right)  # what else the header says names the run
            for name, entry in found.items():
                for key in ("u", "s", "vh"):
                    assert torch.equal(getattr(entry, key), getattr(right[name], key))
                assert entry.fingerprint == right[name].fingerprint
                assert entry.residual == right[name].residual
    assert refused > 0.8 * 8 * len(whole)


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    def flip(tensors, about):
        tensors["layer.1.u"].view(torch.int32)[0, 0] ^= 1

    path = factorized(tmp_path, weights(6, 5))
    with pytest.raises(BasisError, match=r"layer\.1 is damaged: the digest .* make the file again"):
        load_basis(rewritten(path, flip, digests="kept"))


def swap_layers(tensors, about) -> None:
    for key in ("u", "s", "vh"):
        a, b = f"layer.0.{key}", f"layer.1.{key}"
        tensors[a], tensors[b] = tensors[b], tensors[a]


def swap_left(tensors, about) -> None:
    tensors["layer.0.u"], tensors["layer.1.u"] = tensors["layer.1.u"], tensors["layer.0.u"]


def swap_fingerprints(tensors, about) -> None:
    a, b = about["layer.0"], about["layer.1"]
    a["fingerprint"], b["fingerprint"] = b["fingerprint"], a["fingerprint"]


def swap_sides(tensors, about) -> None:  # of a square weight
    u, vh = tensors["layer.0.u"], tensors["layer.0.vh"]
    tensors["layer.0.u"], tensors["layer.0.vh"] = vh.mT.contiguous(), u.mT.contiguous()


def flip_exponent(tensors, about) -> None:
    tensors["layer.0.vh"].view(torch.int32)[1, 2] ^= 1 << 26


def swap_columns(tensors, about) -> None:
    tensors["layer.0.u"] = tensors["layer.0.u"].flip(1).contiguous()


def shrink(tensors, about) -> None:
    tensors["layer.0.s"][1] *= 0.999


SPOILT = [
    swap_layers,
    swap_left,
    swap_fingerprints,
    swap_sides,
    flip_exponent,
    swap_columns,
    shrink,
]


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("digests", ["renewed", "none"])
def test_factors_of_another_weight_are_refused_beside_the_weight(tmp_path, spoil, digests) -> None:
    tensors = weights(12, 12)
    path = rewritten(factorized(tmp_path, tensors), spoil, digests=digests)
    with pytest.raises(BasisError, match=r"layer\.0 names this weight|layer\.1 names this weight"):
        load_basis(path).find(tensors["layer.0.weight"])
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    for layer, weight in zip(model, tensors.values(), strict=True):
        layer.weight.data = weight.clone()
    with pytest.raises(BasisError, match="holds no singular triplets of it"):
        spectralize(model, SpectralConfig(rank=2), basis=path)
    assert all(type(layer) is nn.Linear for layer in model)


def test_vectors_of_vanishing_values_have_to_be_orthonormal(tmp_path: Path) -> None:
    """W v - s u says nothing of u where s is 0."""

    def spoil(tensors, about):
        tensors["layer.0.u"][:, 1] *= 1.5

    w = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 6.0))
    path = factorized(tmp_path, {"layer.0.weight": w})
    assert load_basis(path).find(w) is not None
    with pytest.raises(BasisError, match="orthonormal to"):
        load_basis(rewritten(path, spoil, digests="none")).find(w)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["u", "s", "vh"])
@pytest.mark.parametrize("digests", ["renewed", "none"])
def test_values_that_are_not_finite_are_refused(tmp_path, key, value, digests) -> None:
    def spoil(tensors, about):
        tensors[f"layer.1.{key}"].view(-1)[1] = value

    path = rewritten(factorized(tmp_path, weights(6, 5)), spoil, digests=digests)
    with pytest.raises(BasisError, match=rf"layer\.1\.{key} must hold finite"):
        load_basis(path)


def test_a_file_of_format_1_is_read(tmp_path: Path) -> None:
    tensors = weights(9, 5)
    path = rewritten(factorized(tmp_path, tensors), lambda *_: None, digests="none")
    basis = load_basis(path)
    assert all(basis.find(w) is not None for w in tensors.values())


@pytest.mark.parametrize("stored", [None, "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-22, 2.0**13])
@pytest.mark.parametrize("rank", ["full", "3"])
def test_no_sound_basis_is_refused(tmp_path: Path, dtype, stored, scale, rank) -> None:
    more = 2.0 ** (100 if scale > 1 else -100 if scale < 1 else 0)
    w = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    w *= torch.logspace(0, -5, 24)
    w = (w * scale if dtype == torch.float16 else w.double() * scale * more).to(dtype)
    path = factorized(
        tmp_path, {"a.weight": w}, *(("--dtype", stored) if stored else ()), rank=rank
    )
    assert load_basis(path).find(w) is not None


# -------------------------------------------------------------------------------------------- parts


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch):
    """A run that ended before its parts were joined: (command, folder of parts, what a clean run makes)."""
    tensors = weights(10, 8, 3)
    clean = load_file(factorized(tmp_path, tensors, rank="4"))
    out = tmp_path / "again.safetensors"
    command = ["factorize", str(tmp_path / "model.safetensors"), "-o", str(out), "--rank", "4"]
    with monkeypatch.context() as m:
        m.setattr(cli, "join_parts", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command) == 130
    return command, out.with_name(out.name + ".parts"), clean


def reheaded(change):
    def spoil(path: Path) -> None:
        with safe_open(path, framework="pt") as f:
            metadata = dict(f.metadata())
        about = json.loads(metadata["fastspec-part"])
        save_file(load_file(path), path, {"fastspec-part": change(about)})

    return spoil


def other_rank(path: Path) -> None:
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata()
    t = load_file(path)
    cut = {"u": t["u"][:, :2], "s": t["s"][:2], "vh": t["vh"][:2]}
    save_file({key: value.contiguous() for key, value in cut.items()}, path, metadata)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "another rank": other_rank,
    "a flipped bit": flipped,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "no safetensors": lambda path: path.write_bytes(b"{}"),
    "no metadata": lambda path: save_file(load_file(path), path),
    "metadata no JSON": reheaded(lambda about: "{"),
    "metadata a list": reheaded(lambda about: "[]"),
    "no residual": reheaded(lambda a: json.dumps({k: v for k, v in a.items() if k != "residual"})),
    "no digest": reheaded(lambda a: json.dumps({k: v for k, v in a.items() if k != "digest"})),
    "another dtype": reheaded(lambda a: json.dumps(a | {"dtype": "float16"})),
    "another weight": reheaded(lambda a: json.dumps(a | {"fingerprint": "0" * 64})),
    "another seed": reheaded(lambda a: json.dumps(a | {"seed": 5})),
}


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Names of the weights that are factorised from here on."""
    found: list[str] = []
    topk_svd = cli.topk_svd

    def record(weights, k, *, names, **rest):
        found.extend(names)
        return topk_svd(weights, k, names=names, **rest)

    monkeypatch.setattr(cli, "topk_svd", record)
    return found


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_made_anew(interrupted, damage: str, made, capsys) -> None:
    command, folder, clean = interrupted
    part = parts.part_path(folder, "layer.1.weight")
    DAMAGE[damage](part)
    assert main(command) == 0
    assert made == ["layer.1.weight"]
    assert "layer.1.weight" in capsys.readouterr().err
    found = load_file(command[3])
    assert set(found) == set(clean)
    for name, t in clean.items():
        torch.testing.assert_close(found[name], t, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("damage", [*DAMAGE, "missing"])
def test_a_part_damaged_before_the_end_is_not_joined(
    interrupted, damage: str, monkeypatch, capsys
) -> None:
    """By another process of the same run, say."""
    command, folder, _ = interrupted
    join = cli.join_parts

    def late(*args):
        part = parts.part_path(folder, "layer.2.weight")
        part.unlink() if damage == "missing" else DAMAGE[damage](part)
        join(*args)

    with monkeypatch.context() as m:
        m.setattr(cli, "join_parts", late)
        status = main(command)
    error = capsys.readouterr().err
    assert status == 2, error
    assert "can't be joined" in error
    assert not Path(command[3]).exists()
    assert main(command) == 0
    load_basis(command[3])


def test_another_seed_makes_other_parts(interrupted, made) -> None:
    command, _, _ = interrupted
    assert main([*command, "--seed", "1"]) == 0
    assert len(made) == 3
