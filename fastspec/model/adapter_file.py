"""The file of an adapter folder, `adapter.safetensors`: written in one step, and read without trust.

It is one file, so that a save replaces it by one rename: whatever happens meanwhile, the folder holds the
former adapter or the new one. Its one metadata entry, `fastspec`, is JSON: the config, and a digest of it
and of the tensors, so that a damaged file is no other adapter. The name is none that other libraries look
for, so an adapter may lie in the folder of its base model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fastspec.files import ADAPTER_FILE, excerpt, write_atomically

PEFT_CONFIG = "adapter_config.json"
FORMAT = 3
METADATA = "fastspec"
MAX_HEADER_BYTES = 16 << 20  # the config and the tensors' places; 10,000 layers take two
MAX_RANK = 2**31 - 1

# shape and dtype by name; None: any, of a buffer that a model does not have yet
Expected = dict[str, tuple[tuple[int, ...], torch.dtype] | None]


class AdapterError(ValueError):
    """An adapter folder can't be used with this model; the message says why. The model is unchanged."""


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write the adapter of a folder, which holds the former one until all of the new one is there."""
    header, body = _split(save_tensors(dict(tensors)))
    meta = {"format": FORMAT, **config}
    meta["sha256"] = _digest(meta, header, body)
    text = json.dumps(meta, allow_nan=False)
    write_atomically(folder / ADAPTER_FILE, save_tensors(dict(tensors), {METADATA: text}))


class AdapterFile:
    """The open file of a folder, its header read; nothing else is, before its size was compared.

    Attributes:
        folder: where it lies.
        meta: the fields of the config, their types checked; "spectral" is still to be.
    """

    def __init__(self, folder: Path, file: BinaryIO, size: int) -> None:
        self.folder = folder
        self._path = folder / ADAPTER_FILE
        self._file = file
        self._size = size
        self._head = self._read(8)
        length = int.from_bytes(self._head, "little")
        if len(self._head) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise AdapterError(f"{self._path}: truncated, damaged or no safetensors file")
        self._head += self._read(length)
        try:
            self._header = json.loads(self._head[8:])
            meta = json.loads(self._header.pop("__metadata__")[METADATA])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise AdapterError(
                f"{self._path}: not a usable adapter: its header holds no config of format {FORMAT}; it is "
                "damaged, or of an earlier version: save the adapter again"
            ) from None
        self.meta = _checked(meta, self._path)

    def _read(self, count: int) -> bytes:
        with _errors_of(self._path):
            return self._file.read(count)

    def tensors(
        self, expected: Expected, limit: int, sizes_free: Collection[str]
    ) -> dict[str, Tensor]:
        """The tensors `expected`, and nothing else; of a file above `limit` bytes of them nothing is read.

        Args:
            sizes_free: names of the tensors whose first dimension may be another.

        Raises:
            AdapterError: the file is damaged or holds something else.
        """
        size = sum(math.prod(e[0]) * e[1].itemsize for e in expected.values() if e is not None)
        _check_size(self._path, self._size, min(size, limit) + MAX_HEADER_BYTES)
        body = self._read(self._size - len(self._head))
        try:
            damaged = _digest(self.meta, self._header, body) != self.meta["sha256"]
        except RecursionError:  # of a header, that is nested deeper than any of ours
            damaged = True
        if damaged:
            raise AdapterError(
                f"{self._path}: truncated, damaged or of two saves: the digest differs"
            )
        try:
            tensors = load_tensors(self._head + body)
        except Exception as e:  # what it raises depends on which of its assumptions the file breaks
            raise AdapterError(
                f"{self._path}: not a usable safetensors file: {excerpt(repr(e))}"
            ) from None
        check_tensors(tensors, expected, self.folder, sizes_free)
        return tensors


@contextmanager
def open_adapter(folder: Path) -> Iterator[AdapterFile]:
    """The adapter of a folder.

    Raises:
        FileNotFoundError: there is none.
        AdapterError: it is damaged, too large, of another format or of another library.
    """
    if not os.path.exists(folder / ADAPTER_FILE) and os.path.exists(folder / PEFT_CONFIG):
        raise AdapterError(
            f"{folder}: a folder of PEFT ({PEFT_CONFIG}, but no {ADAPTER_FILE}): load it with "
            "peft.PeftModel.from_pretrained, or with fastspec.peft.load_adapter if it is of this method"
        )
    with open_regular(folder / ADAPTER_FILE) as (file, size):
        yield AdapterFile(folder, file, size)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size in bytes, beyond which nothing should be read: a file may have no end.

    Links are followed wherever they lead, since the caches of model hubs are made of them.
    """
    with _errors_of(path):
        status = path.stat()  # before it is opened: a pipe would wait for a writer
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{path}: not a regular file; expected one of an adapter folder")
        file = path.open("rb")
    with file:
        yield file, status.st_size


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file; expected an adapter folder") from None
    except OSError as e:
        raise AdapterError(f"{excerpt(str(path))}: can't be read: {e.strerror}") from None
    except AdapterError:
        raise
    except ValueError as e:
        raise AdapterError(f"{excerpt(str(path))}: can't be the name of a file: {e}") from None


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file that is no larger than `limit` bytes; of a larger one nothing is read."""
    with open_regular(path) as (file, size):
        _check_size(path, size, limit)
        with _errors_of(path):
            return file.read(size)


def check_tensors(
    tensors: dict[str, Tensor], expected: Expected, folder: Path, sizes_free: Collection[str]
) -> None:
    for name, what in expected.items():
        if name not in tensors:
            raise AdapterError(f"{folder}: the adapter lacks {name}, which this model expects")
        shape, dtype = what or (tuple(tensors[name].shape), tensors[name].dtype)
        have: tuple[int, ...] = tensors[name].shape
        if name in sizes_free and len(have) == len(shape) and have[0] > 0:
            have = (shape[0], *have[1:])
        if have != shape:
            raise AdapterError(
                f"{folder}: {name} is {excerpt(list(tensors[name].shape))} in the adapter, but this "
                f"model expects {excerpt(list(shape))}: another rank, or a head of another size"
            )
        if tensors[name].dtype != dtype:
            raise AdapterError(
                f"{folder}: {name} is {tensors[name].dtype} in the adapter, but this model expects "
                f"{dtype}: cast the model before loading"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise AdapterError(f"{folder}: {name} holds NaN or infinity")
    extra = tensors.keys() - expected.keys()
    if extra:
        raise AdapterError(
            f"{folder}: the adapter holds {excerpt(min(extra))}, which this model does not have"
        )


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    begin = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:begin]), data[begin:]


def _digest(meta: Mapping[str, Any], header: Mapping[str, Any], body: bytes) -> str:
    """SHA-256 over the config without its digest, the tensors' places and their bytes."""
    config = {key: value for key, value in meta.items() if key != "sha256"}
    text = json.dumps([config, header], sort_keys=True, separators=(",", ":"))
    h = hashlib.sha256(text.encode())
    h.update(body)
    return h.hexdigest()


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise AdapterError(
            f"{path}: {size:,} bytes, where an adapter for this model has at most {limit:,}: damaged, of "
            "another rank or with a head of another size"
        )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _checked(meta: Any, path: Path) -> dict[str, Any]:
    try:
        if not isinstance(meta, dict):
            raise TypeError("no JSON object")
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']!r}; this version reads format {FORMAT}")
        for key, kind in (
            ("base", dict),
            ("rows", dict),
            ("state", list),
            ("bases", bool),
            ("sha256", str),
            ("modules_to_save", list),
            ("layers", dict),
            ("spectral", dict),
        ):
            if not isinstance(meta[key], kind):
                raise TypeError(f"{key!r} is not a {kind.__name__}")
        if not isinstance(meta.get("base_model"), (str, type(None))):
            raise TypeError("'base_model' is not a str")
        if not all(isinstance(digest, str) for digest in meta["base"].values()):
            raise TypeError("'base' must map names of tensors to digests")
        if not all(type(n) is int and 0 <= n <= MAX_RANK for n in meta["rows"].values()):
            raise TypeError("'rows' must map names of tensors to counts")
        for value in meta["spectral"].values():
            if not all(map(_is_plain, value if isinstance(value, list) else [value])):
                raise TypeError("'spectral' must map names to numbers, strings or lists of them")
        for key in ("modules_to_save", "state"):
            if not all(isinstance(name, str) and name for name in meta[key]):
                raise TypeError(f"{key!r} must list names")
        ranks = meta["layers"].values()
        if not ranks or not all(type(k) is int and 0 < k <= MAX_RANK for k in ranks):
            raise TypeError("'layers' must map module names to ranks of at least 1")
        return meta
    except KeyError as e:
        raise AdapterError(f"{path}: the key {e} is missing: not an adapter config") from None
    except (ValueError, TypeError, RecursionError) as e:
        raise AdapterError(f"{path}: not a usable adapter config: {excerpt(e)}") from None
