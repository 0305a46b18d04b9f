"""The CUDA route without a card: CPU tensors take it, kernels are compiled for sm_90, and none is started.

Triton's own host code runs as it would on a GPU, from the call of a kernel down to the driver's function that
starts it: that function is replaced here, with those that load a binary and encode a TMA descriptor.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fastspec.kernels import choice, tiles
from fastspec.ops import cuda


class Utils:
    """The compiled part of Triton's driver; `launched` gets the arguments of every start if it is a list."""

    def __init__(self) -> None:
        self.launched: list[tuple] | None = None
        self.binaries = itertools.count(1)

    def launch(self, *args: Any) -> None:
        if self.launched is not None:
            self.launched.append(args)

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


class Driver:
    """An H100 as far as Triton asks for one."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Preferred(dict):
    """Choices of which every kind's is the same."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, kind: str, default: object = None) -> str:
        return self.name

    __getitem__ = get


@contextlib.contextmanager
def rehearsed(preferred: str | None = None) -> Iterator[Driver]:
    """Inside, operators on CPU tensors are those of an H100, which starts nothing.

    `preferred` is the candidate that every kind of call is known to be served by; without it, kinds are
    timed, by whatever stands for `choice.measure`.
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
            choice.choices(torch.device("cpu")).known = Preferred(preferred)
        stack.enter_context(cuda.on_cpu())
        yield driver
