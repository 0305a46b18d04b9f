"""PyTorch's float32 precision: read whichever interface set it, raised for the SVD and put back."""

from __future__ import annotations

import threading

import pytest
import torch

from fastspec import topk_svd
from fastspec.precision import allows_tf32, full_float32
from fastspec.svd import topk as svd

NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")
NAMES = ("fp32_precision", "cuda.matmul.fp32_precision", "mkldnn.matmul.fp32_precision")


def put(name: str, value: str | bool) -> None:
    """Set `torch.backends.<name>`."""
    *path, last = ("backends", *name.split("."))
    owner = torch
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, value)


SETTINGS = {
    "default": (lambda: None, False),
    "allow_tf32": (lambda: put("cuda.matmul.allow_tf32", True), True),
    "medium": (lambda: torch.set_float32_matmul_precision("medium"), True),
}
if NEWER:
    SETTINGS |= {
        "newer, CUDA": (lambda: put("cuda.matmul.fp32_precision", "tf32"), True),
        "newer, all": (lambda: put("fp32_precision", "tf32"), True),
        "newer, CPU": (lambda: put("mkldnn.matmul.fp32_precision", "bf16"), False),
        "both": (
            lambda: (
                torch.set_float32_matmul_precision("high"),
                put("cuda.matmul.fp32_precision", "ieee"),
            ),
            False,
        ),
    }


@pytest.fixture(params=SETTINGS)
def tf32(request):
    """One setting for the test; whether it allows TF32 on CUDA."""
    change, allowed = SETTINGS[request.param]
    change()
    yield allowed
    torch.set_float32_matmul_precision("highest")
    for name in NAMES if NEWER else ():
        put(name, "none")


def state() -> list:
    """Everything that PyTorch says about its settings, what it refuses to say included."""
    found = []
    for ask in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.fp32_precision,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
    ):
        try:
            found.append(ask())
        except (RuntimeError, AttributeError) as e:
            found.append(type(e))
    return found


def test_is_read_whoever_set_it(tf32):
    assert allows_tf32() == tf32


def test_is_full_inside_and_put_back(tf32):
    before = state()
    with full_float32():
        assert not allows_tf32()
        if NEWER:
            assert torch.backends.mkldnn.matmul.fp32_precision in ("ieee", "none")
    assert state() == before


@pytest.mark.skipif(not NEWER, reason="there is one setting only")
def test_what_was_inherited_is_inherited_still():
    torch.backends.fp32_precision = "tf32"
    try:
        with full_float32():
            pass
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = "none"


def test_of_two_threads_the_last_puts_it_back(tf32, monkeypatch):
    """The first thread leaves while the second, which found the raised setting, is still inside."""
    before = state()
    entered, leave = ([threading.Event(), threading.Event()] for _ in range(2))
    chunk_svd, inside = svd._chunk_svd, []

    def wait(*arguments):
        i = int(threading.current_thread().name)
        entered[i].set()
        assert leave[i].wait(60)
        inside.append(allows_tf32())
        return chunk_svd(*arguments)

    monkeypatch.setattr(svd, "_chunk_svd", wait)
    threads = [
        threading.Thread(target=topk_svd, args=(torch.eye(8), 2), name=str(i)) for i in range(2)
    ]
    for thread, event in zip(threads, entered, strict=True):
        thread.start()
        assert event.wait(60)
    for thread, event in zip(threads, leave, strict=True):
        event.set()
        thread.join()
    assert inside == [False, False]
    assert state() == before


def test_a_setting_made_meanwhile_stays():
    try:
        torch.set_float32_matmul_precision("medium")
        with full_float32():
            torch.set_float32_matmul_precision("high")
            with full_float32():
                assert not allows_tf32()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
