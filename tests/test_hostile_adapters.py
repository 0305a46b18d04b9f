"""Adapter folders from anybody: one clear error, the model unchanged, nothing allocated on a claim."""

import copy
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
from support import assert_unchanged, frozen_state, join, little_memory, pack, split, unpack
from tiny_models import IDS, net, trained

from fastspec import (
    SpectralConfig,
    add_task,
    load_adapter,
    load_tasks,
    save_adapter,
    spectralize,
)
from fastspec.files import ADAPTER_FILE as FILE
from fastspec.model.adapter_file import AdapterError

CONFIG = SpectralConfig(rank={"up": 3, "default": 4}, core="dense", train_layernorm=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(tensor file as bytes, config as a dict) of a sound adapter, which `pack` puts together."""
    folder = save_adapter(trained(CONFIG), tmp_path_factory.mktemp("good"))
    return unpack((folder / FILE).read_bytes())


@pytest.fixture(scope="module")
def adapted():
    return spectralize(net(), CONFIG)


@contextmanager
def folder_of(data, config=None):
    """A folder with the adapter of these halves, its digest made to fit; without a config of `data` alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / FILE).write_bytes(data if config is None else pack(data, config))
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
    whole = pack(content, config)
    load = data.draw(st.sampled_from(LOADERS))
    with folder_of(whole[: data.draw(st.integers(0, len(whole) - 1))]) as folder:
        assert refused(folder, load=load)
    header, body = split(content)
    shorter = body[: data.draw(st.integers(0, len(body) - 1))]
    with folder_of(join(header, shorter), config) as folder:
        assert refused(folder, load=load)


def flipped(draw, content):
    # half of them in the header, which is the smaller part
    header = 8 + struct.unpack("<Q", content[:8])[0]
    places = st.one_of(st.integers(0, 8 * header - 1), st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    for bit in draw(st.sets(places, min_size=1, max_size=4)):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@fuzz
@given(st.data())
def test_flipped_bits(good, data):
    content, config = good
    load = data.draw(st.sampled_from(LOADERS))
    with folder_of(flipped(data.draw, pack(content, config))) as folder:
        assert refused(folder, load=load)
    with folder_of(flipped(data.draw, content), config) as folder:
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
    with folder_of(good[0], json.dumps(value)) as folder:
        assert refused(folder)


@fuzz
@given(st.binary(max_size=64))
def test_any_bytes(good, junk):
    with folder_of(junk) as folder:
        assert refused(folder)
    with folder_of(good[0], junk.decode("latin-1")) as folder:
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
    return '{"a":' * depth + "1" + "}" * depth


def spectral(good, **changes):
    return good[1] | {"spectral": good[1]["spectral"] | changes}


PATTERN = "(.*)*(.*)*(.*)*(.*)*(.*)*x"  # takes years
BOMBS = {
    "deep JSON": lambda good: nested(100_000),
    "deep JSON in a field": lambda good: json.dumps(good[1])[:-1] + f',"x":{nested(100_000)}}}',
    "JSON as deep as it is read": lambda good: json.dumps(
        spectral(good, seed=json.loads(nested(900)))
    ),
    "huge integer": lambda good: '{"format": ' + "9" * 100_000 + "}",
    "half a surrogate": lambda good: json.dumps(good[1]).replace("head", "\\ud800"),
    "another format": lambda good: good[1] | {"format": [3]},
    "the format before": lambda good: good[1] | {"format": 2},
    "rank 10^12": lambda good: good[1] | {"layers": {"blocks.0.up": 10**12}},
    "rank 10^4000": lambda good: good[1] | {"layers": {"blocks.0.up": 10**4000}},
    "half width 10^30": lambda good: spectral(good, core="band", half_width=10**30),
    "100,000 layers": lambda good: good[1] | {"layers": {str(i): 1 for i in range(100_000)}},
    "patterns": lambda good: spectral(good, target_modules=PATTERN),
    "patterns that exclude": lambda good: spectral(good, exclude_modules=PATTERN),
    "a list of names that exclude": lambda good: spectral(good, exclude_modules=["up"]),
    "patterns of ranks": lambda good: spectral(good, rank={PATTERN: 4}),
    "patterns for heads": lambda good: spectral(good, modules_to_save=[PATTERN]),
    "a pattern for a name": lambda good: good[1] | {"layers": {PATTERN: 3}},
    "a pattern for a head": lambda good: good[1] | {"modules_to_save": [PATTERN]},
    "the whole model as a head": lambda good: good[1] | {"modules_to_save": [""]},
    "heads that leave the folder": lambda good: good[1] | {"modules_to_save": ["../../head"]},
    "an attribute as a head": lambda good: good[1] | {"modules_to_save": ["__class__"]},
    "a seed beyond 64 bits": lambda good: spectral(good, seed=2**200),
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
    "deep JSON": lambda h, b: struct.pack("<Q", 600_001) + nested(100_000).encode() + b,
    "JSON as deep as it is read": lambda h, b: claims(h, b, dtype=json.loads(nested(900))),
    "not UTF-8": lambda h, b: join(h, b).replace(b"delta", b"\xff\xfe\xff\xfe\xff"),
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


class TestFiles:
    def test_a_sparse_terabyte_is_not_read(self, good):
        with folder_of(*good) as folder, little_memory():
            os.truncate(folder / FILE, 1 << 40)
            began = time.process_time()
            assert refused(folder)
            assert time.process_time() - began < 1

    def test_a_header_of_a_gigabyte_is_not_read(self, good):
        with folder_of(struct.pack("<Q", 1 << 30) + pack(*good)[8:]) as folder, little_memory():
            os.truncate(folder / FILE, 1 << 31)
            assert refused(folder)

    @pytest.mark.parametrize(
        "make",
        [
            os.mkfifo,
            os.mkdir,
            lambda p: p.symlink_to("/dev/zero"),
            lambda p: p.symlink_to("/proc/self/environ"),  # of size 0, and yet not empty
            lambda p: p.symlink_to(p.name),
            lambda p: p.symlink_to("x" * 250),
            lambda p: p.write_bytes(b""),
        ],
        ids=["pipe", "folder", "device", "size 0", "loop", "nowhere", "empty"],
    )
    def test_what_is_no_file_is_not_read(self, good, make):
        with folder_of(*good) as folder:
            (folder / FILE).unlink()
            make(folder / FILE)
            for load in LOADERS:
                assert refused(folder, load=load)

    def test_a_link_out_of_the_folder_is_followed(self, good):
        """The caches of model hubs are made of them."""
        with folder_of(*good) as folder:
            (folder / "blobs").mkdir()
            (folder / FILE).rename(folder / "blobs" / "0")
            (folder / "snapshot").mkdir()
            (folder / "snapshot" / FILE).symlink_to("../blobs/0")
            assert not refused(folder / "snapshot")

    @pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x/" * 3000, "\ud800"], ids=ascii)
    @by_every_loader
    def test_names_that_no_file_can_have(self, name, load):
        assert refused(Path(name), load=load)
        with pytest.raises((AdapterError, FileNotFoundError)):
            load_tasks(net(), name)


LONG = "y" * 10_000
ECHOES = {
    "a core": lambda good: spectral(good, core=LONG),
    "a kind of directions": lambda good: spectral(good, select=LONG),
    "a range of directions": lambda good: spectral(good, select=[LONG]),
    "a half width": lambda good: spectral(good, half_width=LONG),
    "a seed": lambda good: spectral(good, seed=LONG),
    "a flag": lambda good: spectral(good, train_bias=LONG),
    "a field": lambda good: spectral(good, **{LONG: 1}),
    "a format": lambda good: good[1] | {"format": LONG},
    "a layer": lambda good: good[1] | {"layers": {LONG: 1}},
    "a head": lambda good: good[1] | {"modules_to_save": [LONG]},
    "other base weights": lambda good: good[1] | {"base_model": LONG, "base": {LONG: LONG}},
}


@pytest.mark.parametrize("make", ECHOES.values(), ids=ECHOES)
def test_messages_repeat_little_of_the_folder(good, adapted, make):
    for model in (net(), adapted):
        with folder_of(good[0], make(good)) as folder, pytest.raises(AdapterError) as error:
            load_adapter(model, folder)
        assert len(str(error.value)) < 800
        assert "y" * 401 not in str(error.value)


@pytest.mark.parametrize("kind", ["name", "dtype", "shape"])
def test_messages_repeat_little_of_the_header(good, kind):
    header, body = split(good[0])
    entry = header["blocks.0.up.delta"]
    if kind == "name":
        header[LONG] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2}
    else:
        entry[kind] = LONG if kind == "dtype" else [1] * 10_000 + entry["shape"]
    with folder_of(join(header, body), good[1]) as folder, pytest.raises(AdapterError) as error:
        load_adapter(net(), folder)
    assert len(str(error.value)) < 800


def test_the_folder_is_a_file(tmp_path):
    (tmp_path / "a").write_text("x")
    assert refused(tmp_path / "a")


def test_loading_writes_nothing_and_reads_only_its_file(good, monkeypatch):
    opened = []
    with folder_of(*good) as folder:
        (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # a pickle
        (folder / "adapter_config.json").write_text("{")
        real = Path.open
        monkeypatch.setattr(Path, "open", lambda p, *a: opened.append((p.name, *a)) or real(p, *a))
        before = sorted(os.listdir(folder))
        assert not refused(folder)
        assert sorted(os.listdir(folder)) == before
    assert opened == [(FILE, "rb")]
