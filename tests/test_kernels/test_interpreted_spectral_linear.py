"""The tile program under the interpreter: every variant, awkward sizes, every access checked."""

from __future__ import annotations

import inspect
import linecache
import mmap

import pytest
import torch
from kernel_problems import CORES, exact, problem, tf32
from kernel_sanitizer import sanitized
from support import TOLERANCE, assert_close, relative_error

from fastspec.kernels import spectral_linear as kernels
from fastspec.kernels import tile_program, tiles
from fastspec.kernels.tiles import Tile

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)  # Python names it since 3.11
TILE = Tile(32, 32, 32, 4, 2)

# (n, in, out, k): one of everything, both orientations, sizes that divide nothing, full rank, several
# row tiles and column tiles, a rank above what registers hold (in chunks), one row (decoding)
SIZES = [
    (1, 1, 1, 1),
    (33, 63, 17, 16),
    (70, 17, 95, 17),
    (64, 64, 64, 64),
    (100, 40, 70, 3),
    (1, 130, 33, 33),
    (37, 100, 90, 70),
    (5, 200, 150, 129),
]


def run(t: dict, core: str, tile: Tile | None = TILE, needs_dx=True, needs_delta=True, bias=True):
    """(y, p, dx, d delta) of the kernels, every operand in its own poisoned surroundings."""
    name = "diag" if core == "task" else core
    with sanitized() as watch:
        o = {key: watch.guard(v) if v is not None else None for key, v in t.items()}
        factors = (o["u"], o["vh"], o["delta"], name, o["task"])
        y, p = kernels.spectral_linear_fwd(
            o["x"], o["w"], o["bias"] if bias else None, *factors, tile=tile
        )
        dx, grad = kernels.spectral_linear_bwd(
            o["g"], p, o["w"], *factors, needs_dx=needs_dx, needs_delta=needs_delta, tile=tile
        )
    return y, p, dx, grad


@pytest.fixture(params=["fp32", "tf32"])
def arithmetic(request):
    """Both ways of float32: the rank in chunks, and (TF32 allowed) beside the output tile.

    The interpreter multiplies in full precision either way.
    """
    with tf32(request.param == "tf32"):
        assert tiles.kind(torch.float32) == request.param
        yield


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(size, core):
    t = problem(*size, core)
    for got, want in zip(run(t, core), exact(t, core), strict=True):
        assert_close(got, want, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("k", [24, 64, 70])
def test_16_bit(core, dtype, k):
    t = problem(45, 80, 76, k, core, dtype)
    for got, want in zip(run(t, core), exact(t, core), strict=True):
        assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [3, 40])
def test_default_tile(n, dtype):
    t = problem(n, 72, 150, 20, "diag", dtype)
    for got, want in zip(run(t, "diag", tile=None), exact(t, "diag"), strict=True):
        assert_close(got, want, dtype)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    ("needs_dx", "needs_delta"), [(True, False), (False, True), (False, False)]
)
@pytest.mark.usefixtures("arithmetic")
def test_computes_only_what_is_needed(core, needs_dx, needs_delta):
    t = problem(40, 70, 80, 9, core)
    y, _, dx, grad = run(t, core, needs_dx=needs_dx, needs_delta=needs_delta, bias=False)
    want = exact({**t, "bias": torch.zeros_like(t["bias"])}, core)
    assert_close(y, want[0])
    assert (dx is None) == (not needs_dx)
    assert (grad is None) == (not needs_delta)
    if needs_dx:
        assert_close(dx, want[2])
    if needs_delta:
        assert_close(grad, want[3])


@pytest.mark.parametrize("core", CORES)
@pytest.mark.usefixtures("arithmetic")
def test_no_rows(core):
    y, p, dx, grad = run(problem(0, 70, 80, 9, core), core)
    assert y.shape == (0, 80)
    assert p.shape == (0, 9)
    assert dx.shape == (0, 70)
    assert grad.numel() > 0
    assert not grad.any()


@pytest.mark.usefixtures("arithmetic")
def test_any_strides():
    """A transposed weight (GPT-2), a transposed and a strided input, transposed factors."""
    t = problem(37, 48, 56, 20, "diag")
    want = exact(t, "diag")
    strided = {
        "x": t["x"].mT.contiguous().mT,
        "g": torch.stack([t["g"], t["g"]], dim=-1)[..., 0],
        "w": t["w"].mT.contiguous().mT,
        "bias": torch.stack([t["bias"], t["bias"]], dim=-1)[..., 0],
        "u": t["u"].mT.contiguous().mT,
        "vh": t["vh"].mT.contiguous().mT,
        "delta": torch.stack([t["delta"], t["delta"]], dim=-1)[..., 0],
    }
    assert not any(v.is_contiguous() for v in strided.values())
    with sanitized():
        factors = (strided["u"], strided["vh"], strided["delta"])
        y, p = kernels.spectral_linear_fwd(
            strided["x"], strided["w"], strided["bias"], *factors, tile=TILE
        )
        dx, grad = kernels.spectral_linear_bwd(strided["g"], p, strided["w"], *factors, tile=TILE)
    for got, exact_result in zip((y, p, dx, grad), want, strict=True):
        assert_close(got, exact_result)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("block_m", [16, 64])
def test_more_than_32_bits_of_address(block_m):
    """Rows 2^26 elements apart, in memory that is never touched: tiles start beyond 2^31 (16 rows a tile)
    and reach beyond it inside one tile (64 rows)."""
    t = problem(45, 40, 24, 8, "diag")
    x, g = far_apart(t["x"]), far_apart(t["g"])
    tile = Tile(block_m, 16, 16, 4, 2)
    assert kernels._spans_2_31(tile, 8, x) == (block_m == 64)
    factors = (t["u"], t["vh"], t["delta"])
    with sanitized():
        y, p = kernels.spectral_linear_fwd(x, t["w"], t["bias"], *factors, tile=tile)
        dx, grad = kernels.spectral_linear_bwd(g, p, t["w"], *factors, tile=tile)
    for got, want in zip((y, p, dx, grad), exact(t, "diag"), strict=True):
        assert_close(got, want)


def far_apart(t: torch.Tensor) -> torch.Tensor:
    """A copy whose rows are 2^26 elements apart; only its own pages are ever backed by memory."""
    apart = 2**26
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, t.element_size() * len(t) * apart, flags=flags)
    copy = torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, (apart, 1))
    return copy.copy_(t)


@pytest.mark.parametrize("core", CORES)
def test_second_run_has_the_same_bits(core):
    t = problem(70, 50, 60, 20, core, torch.bfloat16)
    for first, second in zip(run(t, core), run(t, core), strict=True):
        assert torch.equal(first, second)


def test_zero_coefficients_change_nothing():
    """At delta = 0 the adapted layer is the frozen one bit for bit (design section 1)."""
    t = problem(40, 50, 60, 20, "diag", torch.bfloat16)
    y = run({**t, "delta": torch.zeros(20)}, "diag")[0]
    nothing = {**t, "u": torch.zeros_like(t["u"]), "vh": torch.zeros_like(t["vh"])}
    assert torch.equal(y, run(nothing, "diag")[0])


@pytest.mark.usefixtures("arithmetic")
def test_rows_without_a_task():
    """They are the frozen layer's bit for bit, and no coefficient hears of them."""
    t = problem(40, 50, 60, 20, "task")
    t["task"][[3, 17, 39]] = torch.tensor([-1, -1, -7])
    y, _, dx, grad = run(t, "task")
    for got, want in zip((y, dx, grad), [exact(t, "task")[i] for i in (0, 2, 3)], strict=True):
        assert_close(got, want)
    nothing = {**t, "u": torch.zeros_like(t["u"]), "vh": torch.zeros_like(t["vh"])}
    frozen_y, _, frozen_dx, _ = run(nothing, "task")
    free = t["task"] < 0
    assert torch.equal(y[free], frozen_y[free])
    assert torch.equal(dx[free], frozen_dx[free])


@pytest.mark.usefixtures("arithmetic")
def test_tasks_beyond_the_table():
    """Their rows are NaN, nobody else's is, and no coefficient hears of them."""
    t = problem(40, 50, 60, 20, "task")
    want = exact(t, "task")
    t["task"][[3, 17]] = torch.tensor([5, 2**40])
    y, _, dx, grad = run(t, "task")
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 17]] = True
    assert torch.equal(y.isnan().all(1), bad)
    assert torch.equal(dx.isnan().all(1), bad)
    assert_close(y[~bad], want[0][~bad])
    assert_close(dx[~bad], want[2][~bad])
    assert grad.isfinite().all()


def test_errors_name_the_argument():
    t = problem(4, 300, 300, 257, "diag")
    with pytest.raises(ValueError, match=r"u must have at most 256 columns \(k\), got 257"):
        kernels.spectral_linear_fwd(t["x"], t["w"], None, t["u"], t["vh"], t["delta"])
    t = problem(4, 30, 30, 5, "dense")
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        kernels.spectral_linear_fwd(t["x"].double(), t["w"], None, t["u"], t["vh"], t["delta"])
    with pytest.raises(ValueError, match="task goes with core='diag', got core='dense'"):
        kernels.spectral_linear_fwd(
            t["x"], t["w"], None, t["u"], t["vh"], t["delta"], "dense", torch.zeros(4).long()
        )


def broken(kernel, old: str, new: str):
    """The kernel with a piece of its source replaced, interpreted like the original."""
    source = inspect.getsource(kernel.fn)
    assert old in source
    scope = dict(vars(tile_program))
    # the interpreter reads a kernel's source from its file; a registered pseudo-file serves as well
    name = f"<broken {kernel.__name__}>"
    code = source.replace(old, new)
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), scope)
    return scope[kernel.fn.__name__]


ROW_OK = "row_ok = tl.arange(0, BLOCK_M) < "
COL_OK = "col_ok = tl.arange(0, BLOCK_N) < "


@pytest.mark.parametrize(
    ("name", "old", "new", "error"),
    [
        ("fwd", "mask=p_ok", "mask=row_ok[:, None]", "store at"),
        ("fwd", "mask=row_ok[:, None] & col_ok[None, :])", "mask=row_ok[:, None])", "store at"),
        ("fwd", ROW_OK + "N - row0", ROW_OK + "BLOCK_M", "load at"),
        ("bwd", COL_OK + "IN - col0", COL_OK + "IN", "load at"),
    ],
)
def test_broken_masks_are_caught(name, old, new, error, monkeypatch):
    attribute = f"spectral_linear_{name}_kernel"
    monkeypatch.setattr(kernels, attribute, broken(getattr(kernels, attribute), old, new))
    t = problem(45, 70, 50, 20, "diag", torch.bfloat16)
    with pytest.raises(Exception, match=f"OutOfBounds.*{error}"):
        run(t, "diag")


def test_a_32_bit_base_is_caught(monkeypatch):
    old, new = "row0 = tl.program_id(0).to(tl.int64)", "row0 = tl.program_id(0)"
    attribute = "spectral_linear_fwd_kernel"
    monkeypatch.setattr(kernels, attribute, broken(getattr(kernels, attribute), old, new))
    t = problem(45, 40, 24, 8, "diag")
    factors = (t["u"], t["vh"], t["delta"])
    with sanitized(), pytest.raises(Exception, match=r"OutOfBounds.*load at"):
        kernels.spectral_linear_fwd(far_apart(t["x"]), t["w"], None, *factors, tile=TILE)


def test_a_dropped_scale_is_caught(monkeypatch):
    """Without its coefficients the correction is wrong by far more than the tolerance."""
    monkeypatch.setattr(
        tile_program, "apply_core", broken(tile_program.apply_core, "proj * delta[None, :]", "proj")
    )
    attribute = "spectral_linear_fwd_kernel"
    kernel = broken(getattr(kernels, attribute), "scaled = apply_core", "scaled = apply_core")
    monkeypatch.setattr(kernels, attribute, kernel)
    t = problem(45, 70, 50, 20, "diag", torch.float16)
    y, want = run(t, "diag")[0], exact(t, "diag")[0]
    assert relative_error(y, want) > 10 * TOLERANCE[torch.float16]
