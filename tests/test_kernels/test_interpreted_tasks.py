"""`task_linear` on a GPU under the interpreter: a task for each row of the batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_problems import exact, problem, tf32
from support import assert_close

from fastspec.kernels import choice, dispatch
from fastspec.ops import task_linear as ops

task_linear = partial(dispatch.task_linear, aten=ops._task_linear)
task_linear_backward = partial(dispatch.task_linear_backward, aten=ops._task_linear_backward)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "_choices", {})


@pytest.mark.parametrize(("name", "k"), [("triton", 8), ("triton", 72), ("tma", 8), ("aten", 8)])
def test_every_candidate_computes_the_same(name, k, monkeypatch):
    """Unadapted rows among them, every candidate, and a rank that goes in chunks."""
    monkeypatch.setenv("FASTSPEC_BACKEND", name)
    monkeypatch.setattr(dispatch.tiles, "capability", lambda device: 90)
    t = problem(30, 96, 80, k, "task")
    batch = torch.tensor([3, -1, 0, 3, -1, 4])
    t["task"] = batch.repeat_interleave(5)
    rest = (t["u"], torch.ones(k), t["vh"], t["delta"], batch, "diag", False)
    with tf32(True):
        y, p = task_linear(t["x"].view(6, 5, 96), t["w"], t["bias"], *rest, True)
        backward = lambda: task_linear_backward(  # noqa: E731
            t["g"].view(6, 5, 80), p, t["w"], *rest, True, True
        )
        dx, grad = backward()
        assert all(map(torch.equal, backward(), (dx, grad)))
    want = exact(t, "task")
    assert_close(y, want[0].view(6, 5, 80))
    assert_close(p, want[1])
    assert_close(dx, want[2].view(6, 5, 96))
    assert_close(grad, want[3])
    assert not grad[[1, 2]].any()  # no row named them


@pytest.mark.parametrize("core", ["band", "dense"])
def test_cores_without_kernels_go_to_aten(core):
    t = problem(6, 24, 40, 8, core)
    table, task = torch.stack([t["delta"], 2 * t["delta"]]), torch.tensor([1, 1, 1, 1, 1, 1])
    t["delta"] = table[1]
    rest = (t["u"], torch.ones(8), t["vh"], table, task, core, False)
    y, p = task_linear(t["x"], t["w"], t["bias"], *rest, True)
    dx, grad = task_linear_backward(t["g"], p, t["w"], *rest, True, True)
    want = exact(t, core)
    assert_close(y, want[0])
    assert_close(dx, want[2])
    assert_close(grad[1], want[3])
    assert not grad[0].any()
