"""Parts of a stack side by side on a CPU, each in a thread of its own that is PyTorch's only one there.

The block Krylov iteration from Python is thousands of small products. Shared among PyTorch's threads, each
ends with threads that spin until the last has come, and beside another busy process they spin against each
other: measured, 6 to 10 times as long as on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastspec.svd.triplets import Triplets

PART = 1 << 22  # entries; a part's size depends on no number of threads, so neither does its result


def in_parts(solve: Callable[[Tensor], Triplets], w: Tensor) -> Triplets:
    """`solve(w)` for a stack [L, m, n], part by part."""
    size = max(1, PART // (w.shape[1] * w.shape[2]))
    parts = w.split(size)
    threads = torch.get_num_threads()

    def one(part: Tensor) -> Triplets:
        torch.set_num_threads(1)
        with torch.no_grad():  # which holds for the thread that said it
            return solve(part)

    pool = ThreadPoolExecutor(min(threads, len(parts)))
    try:
        found = list(pool.map(one, parts))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # MKL has one number for all threads
    return Triplets(*map(torch.cat, zip(*found, strict=True)))
