"""Calls served from what was remembered: the same starts of the same kernels as the ordinary way's.

CPU tensors take the CUDA route with Triton's own host code down to the driver (tests/rehearsal.py). What the
driver is told to start is computed here from the addresses, sizes and strides that it is given, so that a
result is right only if all of them are.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

import pytest
import torch

pytest.importorskip("triton")
from kernel_problems import tf32
from rehearsal import Started, rehearsed
from support import relative_error
from torch import Tensor

from fastspec import _extension
from fastspec.kernels import choice, dispatch, records
from fastspec.ops import reference

pytestmark = pytest.mark.skipif(_extension.load() is not None, reason="csrc/ is not built")

CORES = ("diag", "band", "dense")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPEATS = 2  # a launch with a counter of its own may take one call more to be remembered
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def memory(address: int, shape: tuple, strides: tuple, dtype: torch.dtype) -> Tensor:
    """What lies at an address, as a view."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    raw = (ctypes.c_char * (span * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).as_strided(shape, strides)


class Device:
    """Computes what the driver is told to start."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.started: list[Started] = []
        self.counters: list[int] = []  # of launches that sum their shares

    def __call__(self, started: Started) -> None:
        self.started.append(started)
        if started.kernel == "project_kernel":
            self.project(started)
        elif started.kernel == "reduce_kernel":
            self.reduce(started.values)
        else:
            run = self.forward if "fwd" in started.kernel else self.backward
            run(started.values)

    def project(self, started: Started) -> None:
        """The coefficient gradient alone: all of it as the first share."""
        v = started.values
        n, d, k = v["N"], v["D"], v["K"]
        a = memory(v["a_ptr"], (n, d), (v["stride_an"], v["stride_ad"]), self.dtype).double()
        basis = memory(v["v_ptr"], (d, k), (v["stride_vd"], v["stride_vk"]), self.dtype).double()
        share = (a @ basis).mT @ memory(v["p_ptr"], (n, k), (k, 1), self.dtype).double()
        share = share.diagonal() if v["CORE"] == "diag" else share.flatten()
        slots, cells = started.grid[0] * started.grid[1], len(share)
        shares = memory(v["out_ptr"], (slots, cells), (cells, 1), torch.float32)
        shares.zero_()
        shares[0] = share

    def reduce(self, v: dict) -> None:
        """The coefficient gradient from both projections."""
        n, k = v["N"], v["K"]
        q = memory(v["q_ptr"], (n, k), (v["stride_qn"], 1), self.dtype).double()
        p = memory(v["p_ptr"], (n, k), (k, 1), self.dtype).double()
        memory(v["shares_ptr"], (v["slots"], k), (k, 1), torch.float32).fill_(7.0)  # room for them
        assert v["slots"] * v["steps"] * v["BLOCK_M"] >= n
        memory(v["grad_ptr"], (k,), (1,), torch.float32).copy_((q * p).sum(0))
        assert memory(v["arrived_ptr"], (1,), (1,), torch.int32).item() == 0
        self.counters.append(v["arrived_ptr"])

    def matrix(self, v: dict, name: str, shape: tuple, strides: tuple) -> Tensor:
        """An operand by its descriptor, else by its address."""
        if f"{name}_desc" in v:
            address, _, _, _, _, shape_given, strides_given, _ = v[f"{name}_desc"]
            assert tuple(shape_given) == shape
            return memory(address, shape, tuple(strides_given), self.dtype)
        return memory(v[f"{name}_ptr"], shape, strides, self.dtype)

    def factors(self, v: dict) -> tuple[Tensor, ...]:
        d, out, k = v["IN"], v["OUT"], v["K"]
        s = {n: v.get(f"stride_{n}", 0) for n in ("wo", "wi", "uo", "uk", "vk", "vi")}
        core = memory(
            v["delta_ptr"],
            *(((k,), (1,)) if v["CORE"] == "diag" else ((k, k), (k, 1))),
            torch.float32,
        )
        return (
            self.matrix(v, "w", (out, d), (s["wo"], s["wi"])).double(),
            self.matrix(v, "u", (out, k), (s["uo"], s["uk"])).double(),
            self.matrix(v, "vh", (k, d), (s["vk"], s["vi"])).double(),
            (torch.diag(core) if v["CORE"] == "diag" else core).double(),
        )  # fmt: skip

    def forward(self, v: dict) -> None:
        n, d, out, k = v["N"], v["IN"], v["OUT"], v["K"]
        w, u, vh, core = self.factors(v)
        x = self.matrix(v, "x", (n, d), (v.get("stride_xn"), v.get("stride_xi"))).double()
        p = x @ vh.mT
        y = x @ w.mT + p @ core.mT @ u.mT
        if v["BIAS"]:
            y = y + memory(v["bias_ptr"], (out,), (1,), self.dtype).double()
        memory(v["p_ptr"], (n, k), (k, 1), self.dtype).copy_(p)
        self.matrix(v, "y", (n, out), (out, 1)).copy_(y)

    def backward(self, v: dict) -> None:
        n, d, out, k = v["N"], v["IN"], v["OUT"], v["K"]
        w, u, vh, core = self.factors(v)
        g = self.matrix(v, "g", (n, out), (v.get("stride_gn"), v.get("stride_go"))).double()
        q = g @ u
        self.matrix(v, "dx", (n, d), (d, 1)).copy_(g @ w + q @ core @ vh)
        if not v["GRAD"]:
            return
        slots, cells = -(-n // v["BLOCK_M"]), k if v["CORE"] == "diag" else k * k
        p = memory(v["p_ptr"], (n, k), (k, 1), self.dtype).double()
        shares = memory(
            v["shares_ptr" if "shares_ptr" in v else "grad_ptr"],
            (slots, cells), (cells, 1), torch.float32,
        )  # fmt: skip
        for slot, rows in enumerate(torch.arange(n).split(v["BLOCK_M"])):
            share = q[rows].mT @ p[rows]
            shares[slot] = share.diagonal() if v["CORE"] == "diag" else share.flatten()
        if v.get("SUMMED"):
            memory(v["grad_ptr"], (cells,), (1,), torch.float32).copy_(shares.sum(0))
            assert memory(v["arrived_ptr"], (1,), (1,), torch.int32).item() == 0
            self.counters.append(v["arrived_ptr"])


class Problem:
    """A layer and a batch, in the layouts that are asked for."""

    def __init__(
        self, core: str, dtype: torch.dtype, n=32, d=48, out=32, k=16, bias=True, seed=0, **layouts
    ):
        gen = torch.Generator().manual_seed(seed)

        def laid(name: str, *shape: int) -> Tensor:
            t = torch.randn(*shape, generator=gen).to(dtype)
            match layouts.get(name):
                case "transposed":
                    return t.mT.contiguous().mT
                case "shifted":  # off the 16 bytes
                    return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(shape)
                case "padded":
                    return torch.cat([t, t[:, :8]], 1)[:, : shape[1]]
                case "expanded":
                    return t[:1].expand(shape)
                case "deep":  # more dimensions
                    return t.view(2, shape[0] // 2, shape[1])
            return t

        self.core, self.bias = core, laid("bias", out) if bias else None
        self.x, self.g = laid("x", n, d), laid("g", n, out)
        self.w, self.u, self.vh = laid("w", out, d), laid("u", out, k), laid("vh", k, d)
        self.s = torch.ones(k)
        shape = {"diag": (k,), "band": (3, k), "dense": (k, k)}[core]
        self.delta = torch.randn(shape, generator=gen)

    def run(self, needs_dx=True, needs_delta=True, forward="factored") -> tuple[Tensor, ...]:
        factors = (self.w, self.u, self.s, self.vh, self.delta)
        plan = (self.core, forward, "two_sided" if needs_delta else "none")
        op, back = torch.ops.fastspec.spectral_linear, torch.ops.fastspec.spectral_linear_backward
        y, p = op(self.x, self.w, self.bias, *factors[1:], *plan)
        saved = p if needs_delta else None
        return y, p, *back(self.g, None, saved, *factors, *plan, needs_dx, needs_delta)

    def check(self, needs_dx=True, needs_delta=True, forward="factored") -> None:
        dtype = self.x.dtype
        got = self.run(needs_dx, needs_delta, forward)
        x, g = self.x.double(), self.g.double()
        flat = (x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))
        factors = [t.double() for t in (self.w, self.u, self.vh, self.delta)]
        bias = None if self.bias is None else self.bias.double()
        w, u, vh, delta = factors
        y = reference.spectral_linear(x, w, bias, u, vh, delta, self.core)
        dx, grad = reference.spectral_linear_backward(flat[1], flat[0], *factors, self.core)
        wanted = {
            "y": (got[0], y),
            "p": (got[1], flat[0] @ vh.mT if needs_delta else x.new_empty(0, vh.shape[0])),
            "dx": (got[2], dx.view(x.shape) if needs_dx else x.new_empty(0)),
            "grad": (got[3], grad if needs_delta else x.new_empty(0)),
        }
        for name, (one, exact) in wanted.items():
            assert one.shape == exact.shape, name
            if exact.numel():
                assert relative_error(one, exact) < TOLERANCE[dtype], name


@pytest.fixture
def asked(monkeypatch):
    """The calls that Python was asked to choose for."""
    calls = []
    for name in ("spectral_linear", "spectral_linear_backward"):
        inner = getattr(dispatch, name)

        def seen(*args, inner=inner, name=name, **options):
            calls.append(name)
            return inner(*args, **options)

        monkeypatch.setattr(dispatch, name, seen)
    return calls


@contextlib.contextmanager
def device(preferred: str | None, dtype: torch.dtype):
    with tf32(True), rehearsed(preferred) as driver:
        driver.utils.run = Device(dtype)
        yield driver.utils.run


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("route", ["triton", "tma", "aten", "merged"])
def test_a_second_call_asks_nobody_and_is_right(route, name, core, asked):
    dtype = DTYPES[name]
    with device(route, dtype) as chip:
        for bias in (True, False):
            chip.started.clear()
            for _ in range(REPEATS):
                Problem(core, dtype, bias=bias).check()
            chip.started.clear()
            Problem(core, dtype, bias=bias).check()
            asked_first = len(asked)
            for seed in (1, 2):  # other values, other addresses
                Problem(core, dtype, bias=bias, seed=seed).check()
            assert len(asked) == asked_first
            kernels = [s.kernel for s in chip.started]
            if route in (
                "aten",
                "merged",
            ):  # where cuBLAS makes dx, its projection is reduced apart
                assert kernels == ["reduce_kernel"] * (3 * (core == "diag"))
                continue
            assert len(kernels) == 6
            assert len(set(kernels)) == 2
            assert all(("tma" in kernel) == (route == "tma") for kernel in kernels)


LAYOUTS = [
    {},
    {"x": "transposed"},
    {"x": "shifted"},
    {"x": "padded"},
    {"x": "deep", "g": "deep"},
    {"g": "transposed"},
    {"g": "expanded"},
    {"g": "shifted"},
    {"w": "transposed"},
    {"w": "shifted"},
    {"u": "transposed"},
    {"u": "padded"},
    {"vh": "shifted"},
    {"vh": "transposed"},
    {"bias": "shifted"},
]
SIZES = [
    {"n": 31},
    {"n": 33},
    {"n": 300},
    {"k": 15},
    {"k": 8},
    {"k": 1},
    {"d": 40},
    {"out": 47},
    {"bias": False},
]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("route", ["triton", "tma", "aten"])
def test_calls_that_differ_in_one_thing_do_not_take_each_others_launch(route, core, asked):
    """All of them twice over in one process: every second one is remembered, and right."""
    for dtype in DTYPES.values():
        variants = [Problem(core, dtype, **more) for more in (*LAYOUTS, *SIZES)]
        with device(route, dtype) as chip:
            for _ in range(2):
                for problem in variants:
                    for _ in range(REPEATS):
                        problem.check()
                before = len(asked)
            for problem in variants:
                problem.check()
            assert len(asked) == before
            kernels = {s.kernel for s in chip.started}
            if route == "aten":
                assert kernels == ({"reduce_kernel"} if core == "diag" else set())
            else:
                assert kernels - {"reduce_kernel"}


@pytest.mark.parametrize("route", ["triton", "tma", "aten"])
def test_what_is_needed_is_part_of_a_call(route):
    needs = [(True, True), (True, False), (False, True), (False, False)]
    problem = Problem("diag", torch.bfloat16)
    with tf32(True), rehearsed(route) as driver:
        driver.utils.run = Device(torch.bfloat16)
        for dx, delta in needs * 2:
            problem.check(needs_dx=dx, needs_delta=delta)


def test_launches_that_count_programs_do_not_share_a_counter():
    problem = Problem("diag", torch.bfloat16, n=300)
    with device("tma", torch.bfloat16) as chip:
        for _ in range(50):
            problem.check()
        assert len(set(chip.counters)) == len(chip.counters)
        assert len(chip.counters) in (0, 50)  # where the kernel sums at all


def test_both_dtypes_in_one_process():
    for route in ("triton", "aten"):
        with tf32(True), rehearsed(route) as driver:
            for _ in range(2):
                for dtype in DTYPES.values():
                    driver.utils.run = Device(dtype)
                    Problem("diag", dtype).check()


def test_settings_are_obeyed_from_one_call_to_the_next(monkeypatch, asked):
    problem = Problem("diag", torch.float32)

    def kernels() -> list[str]:
        problem.check()
        chip.started.clear()
        problem.check()
        names = {"reduce_kernel": "reduce"}
        return [names.get(s.kernel, "tma" if "tma" in s.kernel else "plain") for s in chip.started]

    with device("tma", torch.float32) as chip:
        for _ in range(2):
            assert kernels() == ["tma"] * 2
            monkeypatch.setenv("FASTSPEC_BACKEND", "triton")
            assert kernels() == ["plain"] * 2
            monkeypatch.setenv("FASTSPEC_BACKEND", "aten")
            assert kernels() == []
            monkeypatch.delenv("FASTSPEC_BACKEND")
            torch.use_deterministic_algorithms(True)
            assert kernels() == ["reduce"]  # the rule's choice in float32: one product with W_eff
            torch.use_deterministic_algorithms(False)
        assert 8 <= len(asked) <= 12
        monkeypatch.setenv("FASTSPEC_BACKEND", "cublas")
        for _ in range(2):
            with pytest.raises(ValueError, match="FASTSPEC_BACKEND must be one of"):
                problem.run()
        monkeypatch.delenv("FASTSPEC_BACKEND")
        with tf32(False):  # another arithmetic: projections are no longer fused
            found = {choice.describe("fwd", "diag", (problem.x, problem.w, problem.u, problem.vh))}
        assert "fp32" in found.pop().split()


def test_a_call_that_was_not_timed_is_asked_for_again(asked, monkeypatch):
    """While a graph is captured the rule decides; what it decides is not for good."""
    problem = Problem("diag", torch.bfloat16)
    with device(None, torch.bfloat16) as chip:
        monkeypatch.setattr(choice.Call, "choose", lambda self, **_: "triton")
        problem.check()
        problem.check()
        assert len(asked) == 4
        monkeypatch.undo()
        monkeypatch.setattr(choice, "measure", lambda *_: 1.0)  # all alike: the first is ATen
        chip.started.clear()
        problem.check()
        assert not chip.started


def test_another_thread_finds_what_one_remembered(asked):
    problem = Problem("diag", torch.bfloat16)
    problem.x.requires_grad_()
    problem.delta.requires_grad_()
    op = torch.ops.fastspec.spectral_linear
    with device("triton", torch.bfloat16):
        problem.run()
        before = len(asked)
        for _ in range(2):  # autograd's own thread on a GPU; here the call's
            y, _ = op(
                problem.x, problem.w, problem.bias, problem.u, problem.s, problem.vh, problem.delta,
                "diag", "factored", "two_sided",
            )  # fmt: skip
            y.backward(problem.g)
        assert len(asked) == before


def test_nothing_is_kept_but_bounded_tables():
    """After a thousand calls, each on tensors of its own and with rows of its own."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    with tf32(True), rehearsed("tma"):
        for _ in range(REPEATS):
            Problem("diag", torch.bfloat16).run()
        before, kept = alive(), len(records._records)
        for i in range(1000):
            Problem("diag", torch.bfloat16, seed=i).run()
        assert len(records._records) == kept
        assert alive() <= before
        for n in range(8, 58):
            Problem("diag", torch.bfloat16, n=n).run()
        assert kept < len(records._records) <= kept + 100
        assert alive() <= before


def test_records_are_dropped_when_they_are_many(monkeypatch):
    monkeypatch.setattr(records, "MOST", 4)
    monkeypatch.setattr(records, "_records", {})
    with tf32(True), rehearsed("triton"):
        for n in range(8, 28):
            Problem("diag", torch.bfloat16, n=n).run()
    assert len(records._records) <= 4


def test_addresses_of_descriptors_are_bounded(monkeypatch):
    monkeypatch.setattr(records, "MOST_ADDRESSES", 3)
    made = records._Maps(lambda address: [address])
    for address in range(10):
        assert made[address] == [address]
        assert len(made) <= 3


PLANS = [
    (forward, gradient)
    for forward in ("factored", "merged", "resident")
    for gradient in ("two_sided", "dense", "none")
]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("forward", "gradient"), PLANS)
@pytest.mark.parametrize("mixed", [False, True])  # autocast: a wider weight
def test_every_plan_by_atens_calls(core, forward, gradient, mixed, asked):
    t = Problem(core, torch.float32, x="deep", g="deep")
    low = torch.bfloat16 if mixed else torch.float32
    x, g, bias = (one.to(low) for one in (t.x, t.g, t.bias))
    effective = reference.effective_weight(t.w, t.u, t.vh, t.delta, core)
    weight = effective if forward == "resident" else t.w
    factors = (t.u, t.s, t.vh, t.delta, core, forward, gradient)
    needs_delta = gradient != "none"
    with device("aten", low):
        for _ in range(2):
            y, p = torch.ops.fastspec.spectral_linear(x, weight, bias, *factors)
            saved = (x if gradient == "dense" else None, p if gradient == "two_sided" else None)
            back = torch.ops.fastspec.spectral_linear_backward
            dx, grad = back(g, *saved, weight, *factors, True, needs_delta)
    assert len(asked) == 2
    flat = [one.double().flatten(0, 1) for one in (g, x)]
    exact = [one.double() for one in (t.w, t.u, t.vh, t.delta)]
    want_dx, want = reference.spectral_linear_backward(*flat, *exact, core)
    limit = 2e-2 if mixed else 1e-5
    assert relative_error(y.flatten(0, 1), flat[1] @ effective.double().mT + bias) < limit
    assert relative_error(dx.flatten(0, 1), want_dx) < limit
    assert (y.dtype, dx.dtype, grad.dtype) == (low, low, torch.float32)
    if needs_delta:
        assert relative_error(grad, want) < limit
    else:
        assert grad.shape == (0,)


def test_reductions_that_differ_do_not_take_each_others_launch():
    """Rows, columns, dtype, and rows of q that lie apart as in a joined product."""

    def problems(seed: int):
        gen = torch.Generator().manual_seed(seed)
        for n, k, row in ((40, 16, 16), (40, 16, 48), (41, 16, 16), (40, 8, 16), (4000, 16, 16)):
            for dtype in DTYPES.values():
                whole, p = torch.randn(n, row, generator=gen), torch.randn(n, k, generator=gen)
                yield whole.to(dtype)[:, :k], p.to(dtype)

    reduce = torch.ops.fastspec.reduce_diagonal
    with rehearsed() as driver:
        for seed in range(REPEATS + 1):
            for q, p in problems(seed):
                driver.utils.run = chip = Device(q.dtype)
                got = reduce(q, p)
                assert [s.kernel for s in chip.started] == ["reduce_kernel"]
                assert relative_error(got, (q.double() * p.double()).sum(0)) < 1e-6
        driver.utils.run, before = Device(torch.float32), len(records._records)
        reduce(*next(problems(9)))
        assert len(records._records) == before


def test_what_no_kernel_reduces_is_reduced_by_aten():
    q, p = torch.randn(30, 8), torch.randn(30, 8)
    odd = [
        (q.mT.contiguous().mT, p),
        (q, torch.cat([p, p], 1)[:, :8]),
        (q.double(), p),
        (q[:0], p[:0]),
    ]
    with rehearsed() as driver:
        driver.utils.run = chip = Device(torch.float32)
        for _ in range(2):
            for a, b in odd:
                got = torch.ops.fastspec.reduce_diagonal(a, b)
                assert got.dtype == torch.float32
                want = (a.double() * b.double()).sum(0)
                assert len(a) == 0 or relative_error(got, want) < 1e-6
        assert not chip.started


def test_gradients_of_joined_and_shared_products_are_one_launch():
    """q is then a part of dx's rows, and p a copy."""
    d, outs, k = 32, [32, 24], 8
    with device("aten", torch.bfloat16) as chip:
        for seed in range(REPEATS + 2):
            gen = torch.Generator().manual_seed(seed)

            def normal(*shape: int, gen=gen) -> Tensor:
                return torch.randn(*shape, generator=gen).to(torch.bfloat16)

            x, gs = normal(5, 8, d).requires_grad_(), [normal(5, 8, out) for out in outs]
            matrix = torch.zeros(sum(outs) + 2 * k, d + 2 * k, dtype=torch.bfloat16)
            matrix[:, :d] = normal(sum(outs) + 2 * k, d)
            matrix[:32, d : d + k], matrix[32:56, d + k :] = normal(32, k), normal(24, k)
            deltas = [torch.zeros(k, requires_grad=True) for _ in outs]
            chip.started.clear()
            ys = torch.ops.fastspec.shared_input(x, matrix, None, outs, [k, k], deltas)
            found = torch.autograd.grad(ys, [x, *deltas], gs)
            assert [s.kernel for s in chip.started] == ["reduce_kernel"]
            w, x2 = matrix.double(), x.detach().double().view(40, d)
            g2 = [g.double().view(40, -1) for g in gs]
            dx = g2[0] @ w[:32, :d] + g2[1] @ w[32:56, :d]
            want = [dx.view(5, 8, d)]
            for at, u in enumerate((w[:32, d : d + k], w[32:56, d + k :])):
                vh = w[56 + at * k : 56 + (at + 1) * k, :d]
                want.append(((g2[at] @ u) * (x2 @ vh.mT)).sum(0))
            for got, exact in zip(found, want, strict=True):
                assert relative_error(got, exact) < TOLERANCE[torch.bfloat16]


def test_a_backward_called_by_itself_records_no_graph():
    t = Problem("diag", torch.float32)
    t.delta.requires_grad_()
    with rehearsed("aten"):
        for _ in range(2):
            t.run()
