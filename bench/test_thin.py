"""What csrc/thin_products.cpp buys over ATen's products (design section 2, F1 and F2)."""

import dataclasses

import harness
import pytest
import torch

from fastspec import _extension

SIZES = [(2048, 384, 384), (2048, 384, 1536), (1024, 768, 3072), (4096, 768, 768)]
RANKS = (8, 32, 64)


@pytest.mark.skipif(not _extension.has_thin_products(), reason="the compiled part is not there")
def test_quick_thin_products(rounds, show):
    ops = torch.ops.fastspec
    found = {}
    lines = ["\ncompiled thin products: ATen's time over theirs"]
    for (n, d, out), k in ((size, k) for size in SIZES for k in RANKS):
        x, basis = torch.randn(n, d), torch.randn(k, d).mT
        w, left, right = torch.randn(out, d), torch.randn(out, k), torch.randn(k, d)
        scratch = torch.empty_like(w)
        torch.testing.assert_close(ops.thin_project(x, basis), x @ basis, rtol=1e-4, atol=1e-3)
        pairs = {
            "project": (
                lambda x=x, b=basis: ops.thin_project(x, b),
                lambda x=x, b=basis: x @ b,
            ),
            "merge": (
                lambda a=(w, left, right, scratch): ops.thin_merge(*a),
                lambda w=w, l=left, r=right, s=scratch: torch.addmm(w, l, r, out=s),
            ),
        }
        if not ops.thin_merge_supported():
            del pairs["merge"]
        for what, (ours, aten) in pairs.items():
            timing = harness.pairwise(ours, {"aten": aten}, rounds(60))
            name = f"{what} {n} rows, {d} -> {out}, k={k}"
            found[name] = dataclasses.asdict(timing)
            lines.append(f"  {name:40} {timing.ratios['aten']}")
    show("\n".join(lines))
    harness.store("thin", found)
