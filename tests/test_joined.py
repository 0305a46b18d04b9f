"""A kept copy beside its factors: one product for y and p, and one for dx and q (csrc/cuda_joined.cpp)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from support import TOLERANCE, relative_error
from torch import Tensor, nn

import fastspec
from fastspec import _extension
from fastspec.ops import cuda
from fastspec.ops.kept import Room

pytestmark = pytest.mark.skipif(_extension.load() is not None, reason="csrc/ is not built")
BF16 = torch.bfloat16
SIZES = {"square": (48, 48), "in": (64, 32), "out": (32, 64)}  # in, out


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch):
    monkeypatch.setenv("FASTSPEC_BACKEND", "aten")  # no Triton here
    with cuda.on_cpu():
        yield


@contextlib.contextmanager
def products() -> Iterator[list[tuple[int, int, int]]]:
    """The sizes of the products that are made inside: rows, depth, columns."""
    seen: list[tuple[int, int, int]] = []
    with torch.profiler.profile(record_shapes=True) as profile:
        yield seen
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = [shape for shape in event.input_shapes if len(shape) == 2][-2:]
            seen.append((*a, b[1]))


def layer(d: int, out: int, k: int = 13, bias: bool = True, core="diag", dtype=BF16):
    torch.manual_seed(0)
    plain = nn.Linear(d, out, bias=bias, dtype=dtype)
    found = fastspec.SpectralLinear.from_linear(plain, k, core=core)
    nn.init.normal_(found.delta, std=0.3)
    found.keep_merged()
    return found


def run(module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y, (x, module.delta), g.to(y.dtype))


def plain_formulas(module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """In float64, with the copy that the layer has."""
    w, u, vh = (t.detach().double() for t in (module._kept.effective, module.u, module.vh))
    x2, g2 = x.double().flatten(0, -2), g.double().flatten(0, -2)
    y = x2 @ w.mT + (0 if module.bias is None else module.bias.detach().double())
    full = (g2 @ u).mT @ (x2 @ vh.mT)
    grad = full.diagonal() if module.core == "diag" else full
    return y.view(*x.shape[:-1], -1), (g2 @ w).view(x.shape), grad


def check(module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    got = run(module, x, g)
    for one, exact in zip(got, plain_formulas(module, x, g), strict=True):
        assert one.shape == exact.shape
        assert relative_error(one, exact) < TOLERANCE[BF16]
    return got


def batch(d: int, out: int, shape=(3, 10)) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, size, generator=gen).to(BF16) for size in (d, out))  # type: ignore[return-value]


@pytest.mark.parametrize("core", ["diag", "dense"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", SIZES)
def test_one_product_each_way_where_its_result_is_not_wider(kind, bias, core):
    d, out = SIZES[kind]
    module, (x, g) = layer(d, out, bias=bias, core=core), batch(d, out)
    run(module, x, g)  # the first of its kind goes another way
    check(module, x, g)
    with products() as seen:
        y, dx, _ = run(module, x, g)
    n, wide = 30, 16  # 13 directions take 16 columns
    forward = [(n, d, out + wide)] if out <= d else [(n, d, 13), (n, d, out)]
    backward = [(n, out, d + wide)] if d <= out else [(n, out, 13), (n, out, d)]
    reduced = [] if core == "diag" else [(13, n, 13)]
    assert seen == forward + backward + reduced
    assert (y.stride(-2) == out + wide) == (out <= d)
    assert (dx.stride(-2) == d + wide) == (d <= out)
    assert y.view(30, out).shape == y.view(3, 10, 2, -1).flatten(2).view(30, -1).shape


@pytest.mark.parametrize("shape", [(), (1,), (4, 2, 3)], ids=str)
def test_rows_of_any_number_of_dimensions(shape):
    module, (x, g) = layer(48, 48), batch(48, 48, (*shape, 5))
    for _ in range(2):
        check(module, x, g)
    for _ in range(2):
        one = torch.stack([run(module, x[..., :1, :], g[..., :1, :])[0].detach()])
    assert one.shape[-2:] == (1, 48)


def test_a_vector_and_no_rows():
    module, (x, _) = layer(48, 48), batch(48, 48)
    for _ in range(2):
        y = module(x[0, 0])
        assert y.shape == (48,)
        assert relative_error(y, module(x)[0, 0].double()) < TOLERANCE[BF16]
        y, dx, grad = run(module, x[:0], x[:0])
        assert (y.shape, dx.shape) == ((0, 10, 48), (0, 10, 48))
        assert not grad.any()


def test_y_is_written_to_without_harm():
    module, (x, g) = layer(48, 48), batch(48, 48)
    want = run(module, x, g)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.mul_(2.0)
    got = (y, *torch.autograd.grad(y, (leaf, module.delta), g / 2))
    for one, other, factor in zip(got, want, (2.0, 1.0, 1.0), strict=True):
        torch.testing.assert_close(one, other * factor)


def test_what_is_saved_does_not_hold_y():
    module, (x, g) = layer(48, 48), batch(48, 48)
    run(module, x, g)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x.clone().requires_grad_())
    rows = [t for t in saved if t.shape[0] == 30]
    assert [t.shape for t in rows] == [(30, 13)]
    assert rows[0].untyped_storage().nbytes() == 30 * 13 * 2
    assert all(t.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() for t in saved)


def test_no_gradient_no_projection():
    module, (x, _) = layer(48, 48), batch(48, 48)
    with torch.no_grad():
        module(x)
        with products() as seen:
            y = module(x)
    assert seen == [(30, 48, 48)]
    assert y.is_contiguous()


def test_a_bias_that_is_changed_past_its_version_is_seen():
    module, (x, g) = layer(48, 48), batch(48, 48)
    run(module, x, g)
    module.bias.data.add_(3.0)
    check(module, x, g)


def test_a_bias_that_is_trained_stays_itself():
    module, (x, g) = layer(48, 48), batch(48, 48)
    run(module, x, g)
    module.bias.requires_grad_(True)
    for _ in range(2):
        y = module(x)
        (grad,) = torch.autograd.grad(y, module.bias, g)
        assert relative_error(grad, g.double().sum((0, 1))) < TOLERANCE[BF16]
        check(module, x, g)
    assert module._kept.room.bias is None


@pytest.mark.parametrize(
    ("d", "out", "dtype"), [(44, 48, BF16), (48, 44, BF16), (48, 48, torch.float32)], ids=str
)
def test_what_is_not_joined(d, out, dtype):
    module = layer(d, out, dtype=dtype)
    x, g = (t.to(dtype) for t in batch(d, out))
    for _ in range(2):
        y, *_ = run(module, x, g)
        assert y.is_contiguous()


def operands(k: int = 8, size: int = 32) -> dict[str, Tensor]:
    """A layer as the operators get it, its parts in one storage."""
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(BF16)

    u, vh, bias = normal(size, k), normal(k, size), normal(size)
    room = Room.like(torch.empty(size, size, dtype=BF16), bias, u, vh)
    room.effective.copy_(normal(size, size))
    assert room.bias is not None
    room.bias.copy_(bias)
    found = {"weight": room.effective, "bias": room.bias, "u": room.u, "vh": room.vh}
    return {**found, "x": normal(20, size), "g": normal(20, size)}  # type: ignore[dict-item]


def shifted(t: Tensor, by: int) -> Tensor:
    """The same values `by` elements further on in memory of their own."""
    row = t.stride(0) if t.dim() == 2 else 1
    memory = torch.zeros(by + len(t) * row + row, dtype=t.dtype)
    return memory.as_strided(t.shape, t.stride(), by).copy_(t)


CHANGES = {
    "as they are": lambda t: t,
    "another vh": lambda t: {**t, "vh": t["vh"].clone()},
    "another u": lambda t: {**t, "u": t["u"].clone()},
    "another bias": lambda t: {**t, "bias": t["bias"] + 1},
    "no bias": lambda t: {**t, "bias": None},
    "another weight": lambda t: {**t, "weight": shifted(t["weight"], 0)},
    "u and vh changed over": lambda t: {**t, "u": t["vh"].mT, "vh": t["u"].mT},
    "the first directions alone": lambda t: {**t, "u": t["u"][:, :5], "vh": t["vh"][:5]},
    "the last directions alone": lambda t: {**t, "u": t["u"][:, 3:], "vh": t["vh"][3:]},
    "rows of the weight": lambda t: {**t, "weight": t["weight"][:24], "bias": t["bias"][:24],
                                     "u": t["u"][:24], "g": t["g"][:, :24]},
    "columns of the weight": lambda t: {**t, "weight": t["weight"][:, :24], "vh": t["vh"][:, :24],
                                        "x": t["x"][:, :24]},
    "vh as a part of the weight": lambda t: {**t, "vh": t["weight"][:8]},
    "the bias as a row": lambda t: {**t, "bias": t["weight"][0]},
    "float32": lambda t: {k: v.float() for k, v in t.items()},
    "a transposed weight": lambda t: {**t, "weight": t["weight"].mT.contiguous().mT},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_operands_are_taken_as_they_are(change):
    t = CHANGES[change](operands())
    k = t["u"].shape[1]
    factors = (t["u"], torch.ones(k), t["vh"], torch.zeros(k), "diag", "resident", "two_sided")
    for _ in range(2):
        y, p = torch.ops.fastspec.spectral_linear(t["x"], t["weight"], t["bias"], *factors)
        dx, grad = torch.ops.fastspec.spectral_linear_backward(
            t["g"], None, p, t["weight"], *factors, True, True
        )
    d = {name: v if v is None else v.double() for name, v in t.items()}
    bias = 0 if d["bias"] is None else d["bias"]
    want_p = d["x"] @ d["vh"].mT
    wanted = {
        "y": (y, d["x"] @ d["weight"].mT + bias),
        "p": (p, want_p),
        "dx": (dx, d["g"] @ d["weight"]),
        "grad": (grad, (want_p * (d["g"] @ d["u"])).sum(0)),
    }
    for name, (got, exact) in wanted.items():
        assert got.shape == exact.shape
        assert relative_error(got, exact) < TOLERANCE[BF16], name
    joined = ("as they are", "no bias", "another u", "the first directions alone")
    assert y.is_contiguous() == (change not in joined)


def test_what_lies_behind_the_parts_does_not_matter():
    """Operands that lie so by chance: p must not hold what stands behind their bias."""
    t = operands(k=5)
    behind = t["bias"].as_strided((40,), (1,))[32:]
    beside = t["u"].as_strided((32, 8), (t["u"].stride(0), 1))[:, 5:]
    behind.fill_(0.5)
    beside.fill_(float("nan"))
    factors = (t["u"], torch.ones(5), t["vh"], torch.zeros(5), "diag", "resident", "two_sided")
    for _ in range(2):
        y, p = torch.ops.fastspec.spectral_linear(t["x"], t["weight"], t["bias"], *factors)
        dx, grad = torch.ops.fastspec.spectral_linear_backward(
            t["g"], None, p, t["weight"], *factors, True, True
        )
    assert not y.is_contiguous()
    assert relative_error(p, t["x"].double() @ t["vh"].double().mT) < TOLERANCE[BF16]
    assert dx.isfinite().all()
    assert grad.isfinite().all()


def test_a_storage_that_ends_too_early_is_no_joined_one():
    """The places fit, but nothing is left where the product would read."""
    t = operands(k=8)
    row = t["weight"].stride(0)
    storage = torch.zeros((32 + 5) * row + 32, dtype=BF16)  # 5 rows of vh, no bias behind
    matrix = storage[: 37 * row].view(37, row)
    matrix[:32].copy_(t["weight"].as_strided((32, row), (row, 1)))
    weight, u, vh = matrix[:32, :32], matrix[:32, 32:37], matrix[32:37, :32]
    vh.copy_(t["vh"][:5])
    factors = (u, torch.ones(5), vh, torch.zeros(5), "diag", "resident", "two_sided")
    for bias in (None, t["bias"]):
        for _ in range(2):
            y, p = torch.ops.fastspec.spectral_linear(t["x"], weight, bias, *factors)
        assert y.is_contiguous()
        assert relative_error(p, t["x"].double() @ vh.double().mT) < TOLERANCE[BF16]


def test_a_second_backward():
    module, (x, g) = layer(48, 48), batch(48, 48)
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (dx,) = torch.autograd.grad(y, leaf, g, create_graph=True)
        (again,) = torch.autograd.grad(dx.float().square().sum(), module.delta)
    w, u, vh = (t.detach().double() for t in (module._kept.effective, module.u, module.vh))
    delta = torch.zeros(13, dtype=torch.float64, requires_grad=True)
    exact = g.double() @ (w + u @ torch.diag(delta) @ vh)
    (want,) = torch.autograd.grad(exact.square().sum(), delta)
    assert relative_error(again, want) < 2 * TOLERANCE[BF16]
