"""Eager calls of every CUDA route, on CPU tensors and with Triton's launch left out: what the host does."""

from __future__ import annotations

import contextlib
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
from fastspec.ops import aten, task_linear

CALLS = 1000
SIZES = (16, 32, 48, 8)  # n, in, out, k: every address on 16 bytes, so that TMA serves
ROUTES = [
    *(f"layer {name} {dtype}" for name in ("triton", "tma") for dtype in ("bf16", "fp32")),
    "layer merged fp32",
    "layer aten bf16",
    *(f"tasks {name} bf16" for name in ("triton", "tma", "aten")),
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
    shared = {"weight": t["w"]} | {name: t[name] for name in ("u", "s", "vh", "delta")}
    shared |= {"core": "diag", "forward": "factored", "gradient": "two_sided"}
    forward = {**shared, "x": t["x"], "bias": t["bias"]}
    _, p = dispatch.spectral_linear(**forward, aten=aten.spectral_linear)
    backward = {**shared, "g": t["g"], "x": None, "p": p, "needs_dx": True, "needs_delta": True}
    dispatch.spectral_linear_backward(**backward, aten=aten.spectral_linear_backward)


def tasks(t: dict) -> None:
    shared = {"weight": t["w"]} | {name: t[name] for name in ("u", "s", "vh", "table", "task")}
    shared |= {"core": "diag", "short": False}
    forward = {**shared, "x": t["x"], "bias": t["bias"], "saves_p": True}
    _, p = dispatch.task_linear(**forward, aten=task_linear._task_linear)
    backward = {**shared, "g": t["g"], "p": p, "needs_dx": True, "needs_table": True}
    dispatch.task_linear_backward(**backward, aten=task_linear._task_linear_backward)


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


def test_another_layout_has_a_choice_of_its_own(launches, monkeypatch):
    """A dL/dy that TMA can't serve leaves the choice of one that they can."""
    times = iter([2.0, 3.0, 1.0])  # aten, triton, tma; then without the last
    monkeypatch.setattr(choice, "measure", lambda *_: next(times, 9.0))
    t = operands(torch.bfloat16)
    factors = (t["w"], t["u"], t["s"], t["vh"], t["delta"], "diag", "factored", "two_sided")

    def chosen(g: Tensor) -> list[str]:
        launches.clear()
        p = t["x"][:, :8].contiguous()
        backward = dispatch.spectral_linear_backward
        backward(g, None, p, *factors, True, True, aten=aten.spectral_linear_backward)
        return list(launches)

    aligned = chosen(t["g"])
    assert aligned == ["spectral_linear_bwd_tma_kernel"]
    for other in (
        t["g"][:1].expand(16, 48),
        t["g"].mT.contiguous().mT,
        t["g"][:, :1].expand(16, 48),
    ):
        assert chosen(other) != aligned
        assert chosen(t["g"]) == aligned


class Device:
    """A stream and its host, on clocks of their own, milliseconds."""

    def __init__(self, monkeypatch, host: float, device: float, waits: bool = False) -> None:
        self.host = self.device = 0.0
        self.each = host, device, waits

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(event):
                event.time = max(self.host, self.device)

            def query(event):
                return event.time <= self.host

            def synchronize(event):
                self.host = max(self.host, event.time)

            def elapsed_time(event, later):
                return later.time - event.time

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.queue(0.01, cycles / 1.7e6))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def queue(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.host, self.device) + device

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def call(self) -> None:
        host, device, waits = self.each
        self.queue(host, device)
        if waits:
            self.synchronize()


@pytest.mark.parametrize("host", [0.001, 0.2, 3.0])
def test_what_is_measured_is_the_device(host, monkeypatch):
    """However slow the host: 0.02 ms of the device are that."""
    device = Device(monkeypatch, host, 0.02)
    assert choice.measure(device.call, torch.device("cuda", 0)) == pytest.approx(0.02)


def test_a_call_that_waits_for_the_device_is_measured_with_its_waiting(monkeypatch):
    device = Device(monkeypatch, 0.2, 0.02, waits=True)
    assert choice.measure(device.call, torch.device("cuda", 0)) == pytest.approx(0.22, rel=0.2)


def test_a_call_reads_no_file_again(monkeypatch):
    """The choices of a device are found and read once: its name and the folder are not asked for later."""
    names = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names.append(device) or "H1")
    first = choice.choices(torch.device("cuda", 0))
    monkeypatch.setattr(choice.Choices, "_read", lambda self: pytest.fail("read again"))
    assert choice.choices(torch.device("cuda", 0)) is first
    assert len(names) == 1
