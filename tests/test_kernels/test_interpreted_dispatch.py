"""The choice of a candidate: timed once, cached, forced, untimed where it must be; every candidate right."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from kernel_problems import exact, problem, tf32
from support import assert_close

from fastspec.kernels import choice, dispatch
from fastspec.ops import aten

CPU = torch.device("cpu")
spectral_linear = partial(dispatch.spectral_linear, aten=aten.spectral_linear)
spectral_linear_backward = partial(
    dispatch.spectral_linear_backward, aten=aten.spectral_linear_backward
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTSPEC_BACKEND", raising=False)
    monkeypatch.setattr(choice, "_choices", {})
    return tmp_path / "cache"


@pytest.fixture
def timed(monkeypatch):
    """Candidates return their milliseconds; `timed` lists the measured ones."""
    seen = []

    def measure(call, device):
        seen.append(call())
        return seen[-1]

    monkeypatch.setattr(choice, "measure", measure)
    return seen


def candidates(**times):
    return {name: lambda ms=ms: ms for name, ms in times.items()}


def choose(kind="kind", k=32, dtype=torch.bfloat16, **times):
    return choice.Call(kind, candidates(**times), torch.empty(1, dtype=dtype), k).choose()


def test_the_fastest_is_timed_once_and_kept_on_disk(timed, own_cache, monkeypatch):
    times = {"aten": 3.0, "triton": 1.0, "merged": 2.0}
    assert choose(**times) == "triton"
    assert sorted(timed) == [1.0, 2.0, 3.0]
    assert choose(**times) == "triton"
    monkeypatch.setattr(choice, "_choices", {})  # another process
    assert choose(**{**times, "aten": 0.1}) == "triton"
    assert len(timed) == 3
    (file,) = own_cache.iterdir()
    assert json.loads(file.read_text()) == {"kind": "triton"}


def test_a_choice_that_no_longer_serves_is_timed_again(timed):
    assert choose(aten=3.0, triton=1.0) == "triton"
    assert choose(aten=3.0, merged=4.0) == "aten"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"kind": "cuda"}', "null"])
def test_a_damaged_cache_is_replaced(content, timed, own_cache):
    own_cache.mkdir()
    path = choice.choices(CPU).path
    path.write_text(content)
    choice._choices.clear()
    assert choose(aten=3.0, triton=1.0) == "triton"
    assert json.loads(path.read_text()) == {"kind": "triton"}


def test_processes_keep_each_others_choices(timed, own_cache, monkeypatch):
    assert choose("first", aten=3.0, triton=1.0) == "triton"
    mine = choice.choices(CPU)
    monkeypatch.setattr(choice, "_choices", {})
    assert choose("second", aten=1.0, triton=3.0) == "aten"
    mine.remember("third", "merged")
    stored = json.loads(mine.path.read_text())
    assert stored == {"first": "triton", "second": "aten", "third": "merged"}
    assert [f.suffix for f in own_cache.iterdir()] == [".json"]


def test_a_cache_that_cannot_be_written_warns(timed, own_cache):
    own_cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="timings are not kept"):
        assert choose(aten=3.0, triton=1.0) == "triton"


def test_environment_forces(timed, monkeypatch):
    monkeypatch.setenv("FASTSPEC_BACKEND", "aten")
    assert choose(aten=3.0, triton=1.0) == "aten"
    monkeypatch.setenv("FASTSPEC_BACKEND", "tma")
    with pytest.warns(UserWarning, match="FASTSPEC_BACKEND=tma cannot serve: kind"):
        assert choose(aten=3.0, triton=5.0) == "triton"
    monkeypatch.setenv("FASTSPEC_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of triton, tma, merged, aten, got"):
        choose(aten=3.0, triton=1.0)
    assert not timed


def test_deterministic_mode_does_not_time(timed, own_cache):
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(aten=3.0, triton=5.0) == "triton"
        assert choose(aten=3.0, triton=5.0, tma=9.0) == "tma"
        assert choose(aten=3.0, triton=1.0, k=200) == "aten"
        assert choose(aten=3.0, merged=9.0, tma=1.0, dtype=torch.float32) == "merged"
    finally:
        torch.use_deterministic_algorithms(False)
    assert not timed
    assert not own_cache.exists()


def test_kinds_of_call():
    a, w, u, vh = (torch.empty(*size) for size in ((33, 8), (16, 8), (16, 4), (4, 8)))
    kind = choice.describe("fwd", "diag", (a, w, u, vh), True, False)
    assert kind == "fwd diag float32 fp32 n64 8->16 k4 10 r16 r16 r16 r16"
    assert choice.describe("fwd", "diag", (a[:1], w, u, vh)).split()[4] == "n1"
    with tf32(True):
        assert choice.describe("fwd", "diag", (a, w, u, vh), True, False) != kind


def test_layouts_of_an_operand():
    t = torch.empty(6, 8)
    layouts = {
        "r16": t,
        "c16": torch.empty(6, 8).mT,
        "r": torch.empty(6, 9)[:, :8],
        "c": torch.empty(9, 6).mT,
        "s": torch.empty(6, 16)[:, ::2],
        "e": torch.empty(8).expand(6, 8),
    }
    assert {name: choice.layout(matrix) for name, matrix in layouts.items()} == {
        name: name for name in layouts
    }
    assert choice.layout(torch.empty(49)[1:].view(6, 8)) == "r"  # the first element
    assert choice.layout(torch.empty(()).expand(6, 8)) == "e"


@pytest.mark.parametrize(("width", "taken"), [(0, "triton"), (4095, "triton"), (4096, "aten")])
def test_wide_layers_take_cublas_untimed(width, taken):
    call = choice.Call("kind", candidates(aten=1.0, triton=1.0), torch.empty(1).half(), 32, width)
    assert call.choose(may_time=False) == taken


@pytest.mark.parametrize("name", choice.NAMES)
@pytest.mark.parametrize("core", ["diag", "band", "dense"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_candidate_computes_the_same(name, core, bias, monkeypatch):
    monkeypatch.setenv("FASTSPEC_BACKEND", name)
    monkeypatch.setattr(dispatch.tiles, "capability", lambda device: 90)
    t = problem(30, 24, 40, 8, core)
    b = t["bias"] if bias else None
    if not bias:
        t["bias"] = torch.zeros_like(t["bias"])
    s = torch.ones(8)
    rest = (t["u"], s, t["vh"], t["delta"], core, "factored", "two_sided")
    with tf32(True):
        y, p = spectral_linear(t["x"].view(5, 6, 24), t["w"], b, *rest)
        g = t["g"].view(5, 6, 40)
        dx, grad = spectral_linear_backward(g, None, p, t["w"], *rest, True, True)
    want = exact(t, core)
    assert_close(y, want[0].view(5, 6, 40))
    assert_close(p, want[1])
    assert_close(dx, want[2].view(5, 6, 24))
    assert_close(grad, want[3])


@pytest.mark.parametrize("name", ["triton", "aten"])
@pytest.mark.parametrize(("needs_dx", "needs_delta"), [(True, False), (False, True)])
def test_what_is_not_needed_is_empty(name, needs_dx, needs_delta, monkeypatch):
    monkeypatch.setenv("FASTSPEC_BACKEND", name)
    t = problem(30, 24, 40, 8, "diag")
    gradient = "two_sided" if needs_delta else "none"
    rest = (t["u"], torch.ones(8), t["vh"], t["delta"], "diag", "factored", gradient)
    y, p = spectral_linear(t["x"], t["w"], t["bias"], *rest)
    assert p.shape == (30 if needs_delta else 0, 8)
    saved = p if needs_delta else None
    needs = (needs_dx, needs_delta)
    dx, grad = spectral_linear_backward(t["g"], None, saved, t["w"], *rest, *needs)
    want = exact(t, "diag")
    assert_close(y, want[0])
    assert dx.numel() == 0 if not needs_dx else assert_close(dx, want[2]) is None
    assert grad.numel() == 0 if not needs_delta else assert_close(grad, want[3]) is None


def test_what_kernels_cannot_serve_goes_to_aten(timed):
    """float64, a mixed precision, a rank above the limit, a plan that saves x: ATen, without timing."""
    t = problem(10, 24, 40, 8, "diag")
    doubled = [t[key].double() for key in ("w", "u", "vh", "delta")]
    w, u, vh, delta = doubled
    s = torch.ones(8, dtype=torch.float64)
    rest = (w, t["bias"].double(), u, s, vh, delta, "diag", "factored", "two_sided")
    y, _ = spectral_linear(t["x"].double(), *rest)
    assert_close(y, exact(t, "diag")[0], torch.float32)
    assert not timed
