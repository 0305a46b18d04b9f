"""The CUDA route without a card: CPU tensors take it, kernels are compiled for sm_90, and none is started.

Triton's own host code runs as it would on a GPU, from the call of a kernel down to the driver's function that
starts it: that function is replaced here, with those that load a binary and encode a TMA descriptor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fastspec.kernels import choice, tiles
from fastspec.ops import cuda, functional  # noqa: F401  (the latter registers the operators)


class Utils:
    """The compiled part of Triton's driver. `run`, where it is set, is given every start (`Started`)."""

    def __init__(self) -> None:
        self.run: Callable[[Started], None] | None = None
        self.source: Any = None  # of the kernel that is about to start
        self.binaries = itertools.count(1)

    def launch(self, *args: Any) -> None:
        if self.run is not None:
            flat = args[-1] if FLAT_FROM is None else args[FLAT_FROM:]
            self.run(Started.of(self.source, tuple(args[:3]), list(flat)))

    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        handle = next(self.binaries)
        return handle, handle, 128, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def fill_tma_descriptor(self, *args: Any) -> tuple:
        return args

    fill_tma_descriptor_tiled = fill_tma_descriptor


# where a kernel's own arguments begin among those of Triton's launcher; None where they are its last
FLAT_FROM = getattr(nvidia, "_BASE_ARGS_FORMAT_LEN", None)


@dataclasses.dataclass(frozen=True)
class Started:
    """One start of a kernel as the driver gets it: pointers as addresses, all by the kernel's names."""

    kernel: str
    grid: tuple[int, int, int]
    values: dict[str, Any]

    @classmethod
    def of(cls, source: Any, grid: tuple, flat: list) -> Started:
        values: dict[str, Any] = {}
        for name in source.fn.arg_names:
            if name.endswith("_desc"):  # the driver's descriptor, two sizes, two strides
                values[name], *_ = flat[0], *(flat.pop(0) for _ in range(5))
            else:
                value = flat.pop(0)
                values[name] = value.data_ptr() if isinstance(value, torch.Tensor) else value
        assert not flat
        names = source.fn.arg_names
        for (place, *_), value in source.constants.items():
            assert values[names[place]] == value, (
                f"{names[place]}: {values[names[place]]} is not {value}"
            )
        for (place, *_), attributes in source.attrs.items():
            if ["tt.divisibility", 16] in attributes:
                assert values[names[place]] % 16 == 0, f"{names[place]} was compiled for 16 bytes"
        return cls(source.fn.__name__, grid, values)


class Launcher(nvidia.CudaLauncher):
    """Triton's launcher, which in 3.6 compiles C of its own for every signature: here it starts nothing."""

    def __init__(self, src: Any, metadata: Any) -> None:
        stub = SimpleNamespace(launch=triton.runtime.driver.active.utils.launch)
        compiled = {
            "make_launcher": lambda *_: "",
            "compile_module_from_src": lambda **_: stub,
            "library_dirs": list,
            "annotate_arguments": lambda signature: signature,
            "make_kernel_signature": lambda signature: signature,
        }
        with contextlib.ExitStack() as stack:
            for name, value in compiled.items():
                if hasattr(nvidia, name):
                    stack.enter_context(mock.patch.object(nvidia, name, value))
            super().__init__(src, metadata)
        self.source = src

    def __call__(self, *args: Any) -> None:
        triton.runtime.driver.active.utils.source = self.source
        super().__call__(*args)


class Driver:
    """An H100 as far as Triton asks for one."""

    launcher_cls = Launcher
    utils = Utils()  # one for good: Triton keeps compiled kernels, and they keep it

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Preferred(choice.Choices):
    """The same choice for every kind of call, but for those that it can't serve."""

    class Known(dict):
        name = ""

        def get(self, kind: str, default: object = None) -> str:
            return super().get(kind, self.name)

        __getitem__ = get

    def __init__(self, name: str) -> None:
        self.known = self.Known()
        self.known.name = name

    def remember(self, kind: str, name: str) -> None:
        self.known[kind] = name


@contextlib.contextmanager
def rehearsed(preferred: str | None = None) -> Iterator[Driver]:
    """Inside, operators on CPU tensors are those of an H100, which starts nothing.

    `preferred` is the candidate that every kind of call is known to be served by, where it can; without it,
    kinds are timed, by whatever stands for `choice.measure`.
    """
    driver, active = Driver(), triton.runtime.driver
    slot = "_active" if hasattr(active, "_active") else "active"
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (active, slot, driver),
            (tiles, "capability", lambda device: 90),
            (tiles, "multiprocessors", lambda device: 132),
            (torch.cuda, "get_device_name", lambda device: "H100"),
            (choice, "_choices", {}),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict("os.environ", {"FASTSPEC_CACHE": folder}))
        if preferred is not None:
            choice._choices[torch.device("cpu")] = Preferred(preferred)
            stack.enter_context(mock.patch.object(choice, "measure", return_value=1.0))
        stack.enter_context(cuda.on_cpu())
        stack.callback(setattr, driver.utils, "run", None)
        yield driver
