"""Eager calls of every CUDA route, on CPU tensors and with Triton's launch left out: what the host does."""

from __future__ import annotations

import gc

import pytest
import torch

pytest.importorskip("triton")
import triton
from kernel_problems import problem, tf32
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

from fastspec.kernels import choice, dispatch, sigma_grad, tiles
from fastspec.kernels.merge import merge

CALLS = 1000
SIZES = (16, 32, 48, 8)  # n, in, out, k: every address on 16 bytes, so that descriptors serve
ROUTES = [
    *(f"layer {name} {dtype}" for name in ("triton", "descriptors") for dtype in ("bf16", "fp32")),
    "layer merged fp32",
    "layer aten bf16",
    *(f"tasks {name} bf16" for name in ("triton", "descriptors", "aten")),
    *(f"{part} bf16" for part in ("project", "sigma_grad", "merge")),
]


@pytest.fixture(autouse=True)
def launches(tmp_path, monkeypatch):
    """The names of the kernels that were started; none runs."""
    seen = []
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda self, *_, **__: seen.append(self.fn.__name__)
    )
    monkeypatch.setattr(tiles, "capability", lambda device: 90)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setenv("FASTSPEC_CACHE", str(tmp_path))
    with tf32(True):
        yield seen


def layer(t: dict) -> None:
    """Forward, and backward by both wants."""
    factors = (t["w"], t["u"], t["s"], t["vh"], t["delta"], "diag", "factored", "two_sided")
    _, p = dispatch.spectral_linear(t["x"], t["bias"], *factors)
    dispatch.spectral_linear_backward(t["g"], None, p, *factors, True, True)


def tasks(t: dict) -> None:
    factors = (t["w"], t["u"], t["s"], t["vh"], t["table"], t["task"], "diag", False)
    _, p = dispatch.task_linear(t["x"], t["bias"], *factors, True)
    dispatch.task_linear_backward(t["g"], p, *factors, True, True)


CALLED = {
    "layer": layer,
    "tasks": tasks,
    "project": lambda t: sigma_grad.project(t["g"], t["u"]),
    "sigma_grad": lambda t: sigma_grad.sigma_grad(t["g"], t["u"], t["x"][:, :8].contiguous()),
    "merge": lambda t: merge(*([t[key]] * 3 for key in ("w", "u", "vh", "delta"))),
}


def operands(dtype: torch.dtype) -> dict[str, Tensor]:
    t = problem(*SIZES, "diag", dtype)
    more = {"s": torch.ones(8), "table": torch.zeros(5, 8), "task": torch.zeros(16).long()}
    return {**t, **more}


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_is_kept(route, launches, monkeypatch):
    """After a thousand calls on tensors of their own: no tensor more, no entry in PyTorch's table."""
    what, *name, dtype = route.split()
    if name:
        monkeypatch.setenv("FASTSPEC_BACKEND", *name)
    t = operands({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])

    def call() -> None:
        CALLED[what]({key: v if v is None else v.clone() for key, v in t.items()})

    call()
    each = len(launches)
    assert (each > 0) == ("aten" not in name)
    before, entries = tensors_alive(), len(kernel_side_table.constant_args)
    for _ in range(CALLS):
        call()
    assert len(launches) == (1 + CALLS) * each
    assert len(kernel_side_table.constant_args) == entries
    assert tensors_alive() <= before  # an earlier test's may go meanwhile


def test_a_call_reads_no_file_again(monkeypatch):
    """The choices of a device are found and read once: its name and the folder are not asked for later."""
    names = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names.append(device) or "H1")
    first = choice.choices(torch.device("cuda", 0))
    monkeypatch.setattr(choice.Choices, "_read", lambda self: pytest.fail("read again"))
    assert choice.choices(torch.device("cuda", 0)) is first
    assert len(names) == 1
