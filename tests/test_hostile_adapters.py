"""Adapter folders from anybody: one clear error, the model unchanged, nothing allocated on a claim."""

import copy
import hashlib
import json
import os
import struct
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import assert_unchanged, frozen_state, little_memory
from tiny_models import IDS, net, trained

from fastspec import (
    SpectralConfig,
    add_task,
    load_adapter,
    load_tasks,
    save_adapter,
    spectralize,
)
from fastspec.model.adapter import AdapterError

CONFIG = SpectralConfig(rank={"up": 3, "default": 4}, core="dense", train_layernorm=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(tensor file as bytes, adapter config as a dict) of a sound adapter."""
    folder = save_adapter(trained(CONFIG), tmp_path_factory.mktemp("good"))
    config = json.loads((folder / "adapter_config.json").read_text())
    return (folder / "adapter.safetensors").read_bytes(), config


@pytest.fixture(scope="module")
def adapted():
    return spectralize(net(), CONFIG)


def split(data):
    """(header as a dict, the bytes after it) of a safetensors file."""
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def join(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@contextmanager
def folder_of(data, config, *, honest=True):
    """A folder of these halves; the digest is made to fit unless `honest` is False."""
    if honest and isinstance(config, dict) and "tensors_sha256" in config:
        config = config | {"tensors_sha256": hashlib.sha256(data).hexdigest()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "adapter.safetensors").write_bytes(data)
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "adapter_config.json").write_bytes(text)
        yield folder


def load_as_task(model, folder):
    return load_tasks(model, [folder], name=lambda folder: "hostile")


def add_as_task(model, folder):
    return add_task(model, "hostile", folder)


LOADERS = [load_adapter, load_as_task, add_as_task]
by_every_loader = pytest.mark.parametrize("load", LOADERS)


def refused(folder, model=None, load=load_adapter):
    """Load; True if refused. Then the model must be as before, and else its values must be finite."""
    model = model or net()
    before = frozen_state(model, IDS)
    try:
        load(model, folder)
    except (AdapterError, FileNotFoundError):
        assert_unchanged(model, before, IDS)
        return True
    tensors = (*model.parameters(), *model.buffers())
    assert all(bool(torch.isfinite(t).all()) for t in tensors)
    model(IDS)
    return False


fuzz = settings(max_examples=60, deadline=None, derandomize=True)


@by_every_loader
def test_the_sound_adapter_loads(good, adapted, load):
    with folder_of(*good) as folder, little_memory():
        assert not refused(folder, load=load)
        assert not refused(folder, copy.deepcopy(adapted), load)


@fuzz
@given(st.data())
def test_truncated(good, data):
    content, config = good
    keep = data.draw(st.integers(0, len(content) - 1))
    for honest in (False, True):
        with folder_of(content[:keep], config, honest=honest) as folder:
            assert refused(folder, load=data.draw(st.sampled_from(LOADERS)))


@fuzz
@given(st.data())
def test_flipped_bits(good, data):
    content, config = good
    # half of them in the header, which is the smaller part
    header = 8 + struct.unpack("<Q", content[:8])[0]
    places = st.one_of(st.integers(0, 8 * header - 1), st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    for bit in data.draw(st.sets(places, min_size=1, max_size=4)):
        changed[bit // 8] ^= 1 << bit % 8
    load = data.draw(st.sampled_from(LOADERS))
    with folder_of(bytes(changed), config, honest=False) as folder:
        assert refused(folder, load=load)
    with folder_of(bytes(changed), config) as folder:
        refused(
            folder, load=load
        )  # a flipped value is another adapter: it may load, if it is finite


NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.integers(2**31 - 1, 2**65),
    st.floats(),
    st.sampled_from([-1, 0, 10**30, 1e308]),
)
NAMES = st.one_of(
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "..", "", "a\0b", "spectral", "__class__"]),
    st.sampled_from(["blocks.0.up", "blocks.0.up.delta", "head", "embed", "blocks", "default"]),
    st.text(max_size=8),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, NAMES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)


def places(value, path=()):
    """The paths of all values inside nested dicts and lists."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def mutated(draw, value):
    """`value` with a replaced, removed, added or renamed entry at a drawn place."""
    value = copy.deepcopy(value)
    path = draw(st.sampled_from(list(places(value))[1:]))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    action = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename"]))
    if action == "replace":
        parent[path[-1]] = draw(VALUES)
    elif action == "remove":
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.append(draw(VALUES))
    elif action == "add":
        parent[draw(NAMES)] = draw(VALUES)
    else:
        parent[draw(NAMES)] = parent.pop(path[-1])
    return value


@settings(fuzz, max_examples=250)
@given(st.data())
def test_any_change_of_the_config(good, adapted, data):
    content, config = good
    changed = mutated(data.draw, config)
    assume(changed != config)
    with folder_of(content, changed) as folder:
        model = copy.deepcopy(adapted) if data.draw(st.booleans()) else None
        refused(folder, model, data.draw(st.sampled_from(LOADERS)))


@settings(fuzz, max_examples=150)
@given(st.data())
def test_any_change_of_the_header(good, data):
    content, config = good
    header, body = split(content)
    changed = mutated(data.draw, header)
    assume(changed != header)
    with folder_of(join(changed, body), config) as folder, little_memory():
        refused(folder, load=data.draw(st.sampled_from(LOADERS)))


@fuzz
@given(VALUES)
def test_any_json_for_a_config(good, value):
    with folder_of(good[0], json.dumps(value).encode()) as folder:
        assert refused(folder)


@fuzz
@given(st.binary(max_size=64))
def test_any_bytes_for_either_file(good, junk):
    content, config = good
    with folder_of(content, junk) as folder:
        assert refused(folder)
    with folder_of(junk, config) as folder:
        assert refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["blocks.0.up.delta", "head.bias"])
@by_every_loader
def test_values_that_are_not_finite(good, name, value, load):
    content, config = good
    header, body = split(content)
    at = header[name]["data_offsets"][0]
    body = body[:at] + struct.pack("<f", value) + body[at + 4 :]
    with folder_of(join(header, body), config) as folder:
        assert refused(folder, load=load)


@pytest.mark.parametrize(
    "dtype", ["F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X9"]
)
@by_every_loader
def test_another_dtype(good, dtype, load):
    content, config = good
    header, body = split(content)
    header["blocks.0.up.delta"]["dtype"] = dtype
    with folder_of(join(header, body), config) as folder:
        assert refused(folder, load=load)


def test_every_tensor_in_double_precision(good, tmp_path):
    from safetensors.torch import load, save

    content, config = good
    wide = save({name: t.double() for name, t in load(content).items()})
    with folder_of(wide, config) as folder, pytest.raises(AdapterError, match=r"float64.*float32"):
        load_adapter(net(), folder)


def nested(depth):
    return b'{"a":' * depth + b"1" + b"}" * depth


def config_bytes(good, **changes):
    return json.dumps(good[1] | changes).encode()


BOMBS = {
    "deep JSON": lambda good: nested(100_000),
    "deep JSON in a field": lambda good: config_bytes(good)[:-1]
    + b',"x":'
    + nested(100_000)
    + b"}",
    "huge integer": lambda good: b'{"format": ' + b"9" * 100_000 + b"}",
    "not UTF-8": lambda good: b'{"format": "\xff\xfe"}',
    "half a surrogate": lambda good: config_bytes(good).replace(b"head", b"\\ud800"),
    "another format": lambda good: config_bytes(good, format=[2]),
    "rank 10^12": lambda good: config_bytes(good, layers={"blocks.0.up": 10**12}),
    "half width 10^30": lambda good: config_bytes(
        good, spectral=good[1]["spectral"] | {"core": "band", "half_width": 10**30}
    ),
    "100,000 layers": lambda good: config_bytes(good, layers={str(i): 1 for i in range(100_000)}),
    "patterns": lambda good: config_bytes(
        good, spectral=good[1]["spectral"] | {"target_modules": "(.*)*(.*)*(.*)*(.*)*x"}
    ),
    "a pattern for a name": lambda good: config_bytes(good, layers={"(.*)*(.*)*(.*)*x": 3}),
    "the whole model as a head": lambda good: config_bytes(good, modules_to_save=[""]),
    "heads that leave the folder": lambda good: config_bytes(good, modules_to_save=["../../head"]),
    "an attribute as a head": lambda good: config_bytes(good, modules_to_save=["__class__"]),
    "a seed beyond 64 bits": lambda good: config_bytes(
        good, spectral=good[1]["spectral"] | {"seed": 2**200}
    ),
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
@by_every_loader
def test_bombs_in_the_config(good, adapted, make, load):
    config = make(good)
    for model in (net(), adapted):
        began = time.process_time()
        with folder_of(good[0], config) as folder, little_memory():
            assert refused(folder, model, load)
        assert time.process_time() - began < 5


def claims(header, body, **entry):
    return join(header | {"blocks.0.up.delta": header["blocks.0.up.delta"] | entry}, body)


HEADERS = {
    "a header of 2^63 bytes": lambda h, b: struct.pack("<Q", 2**63) + join(h, b)[8:],
    "a header of 100 MB": lambda h, b: struct.pack("<Q", 10**8) + join(h, b)[8:],
    "deep JSON": lambda h, b: struct.pack("<Q", 600_001) + nested(100_000) + b,
    "2^40 numbers": lambda h, b: claims(h, b, shape=[2**20, 2**20]),
    "2^80 numbers": lambda h, b: claims(h, b, shape=[2**40, 2**40]),
    "nothing, as [0, 2^62]": lambda h, b: claims(h, b, shape=[0, 2**62], data_offsets=[0, 0]),
    "offsets beyond the end": lambda h, b: claims(h, b, data_offsets=[0, 2**40]),
    "offsets backwards": lambda h, b: claims(h, b, data_offsets=[36, 0]),
    "overlapping tensors": lambda h, b: claims(h, b, data_offsets=[0, 36]),
    "a name that leaves the folder": lambda h, b: join(
        {("../../x" if n == "blocks.0.up.delta" else n): e for n, e in h.items()}, b
    ),
}


@pytest.mark.parametrize("make", HEADERS.values(), ids=HEADERS)
@by_every_loader
def test_bombs_in_the_header(good, make, load):
    content, config = good
    with folder_of(make(*split(content)), config) as folder, little_memory():
        began = time.process_time()
        assert refused(folder, load=load)
        assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter_config.json"])
class TestFiles:
    def test_a_sparse_terabyte_is_not_read(self, good, name):
        with folder_of(*good) as folder, little_memory():
            os.truncate(folder / name, 1 << 40)
            began = time.process_time()
            assert refused(folder)
            assert time.process_time() - began < 1

    def test_what_is_no_file_is_not_read(self, good, name):
        with folder_of(*good) as folder:
            for make in (os.mkfifo, os.mkdir, lambda p: p.symlink_to("/dev/zero")):
                (folder / name).rename(folder / "aside")
                make(folder / name)
                assert refused(folder)
                (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
                (folder / "aside").rename(folder / name)
            assert not refused(folder)

    def test_a_loop_of_links(self, good, name):
        with folder_of(*good) as folder:
            (folder / name).unlink()
            (folder / name).symlink_to(name)
            assert refused(folder)


def test_the_folder_is_a_file(tmp_path):
    (tmp_path / "a").write_text("x")
    assert refused(tmp_path / "a")


def test_loading_writes_nothing_and_reads_only_its_two_files(good, monkeypatch):
    opened = []
    with folder_of(*good) as folder:
        (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # a pickle
        real = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda p: opened.append(p.name) or real(p))
        before = sorted(os.listdir(folder))
        assert not refused(folder)
        assert sorted(os.listdir(folder)) == before
    assert opened == ["adapter_config.json", "adapter.safetensors"]
