"""Tiles for the TMA kernels, and what cuBLAS takes for the parts of a layer: the ground for the defaults.

First all tiles are compiled, and their answers checked, in several processes. Then every tile's forward
and backward is timed over the frozen layer's, as in the step `layers`; beside it the products of which the
plan on ATen calls consists, and the frozen weight and factor side by side in one product.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from kernel_problems import exact, problem
from support import relative_error

from fastspec.kernels import tiles, tma
from fastspec.kernels.reduce import reduce_diagonal
from fastspec.kernels.sigma_grad import sigma_grad
from gpu import device, record, workers
from gpu.calls import tolerance
from gpu.device import DEVICE, pick
from gpu.layers import BF16, Layer, frozen, sets
from gpu.record import Record

PROCESSES = pick(12, 2)
ROUNDS = pick(7, 1)
PATIENCE = pick(40, 600)  # seconds for one tile to compile and be checked
COMPILING = 0.35  # share of the time
# rows, columns, depth of a step, warps, stages
TILES = pick(
    [
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (64, 128, 64, 4, 4),
        (64, 128, 64, 4, 3),
        (64, 256, 64, 8, 3),
        (128, 64, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 128, 8, 2),
        (64, 128, 128, 4, 3),
        (256, 128, 64, 8, 4),
    ],
    [(16, 16, 16, 4, 2)],
)
LAYERS = pick(
    [
        Layer(4096, 768, 768),
        Layer(4096, 768, 3072),
        Layer(4096, 3072, 768),
        Layer(8192, 4096, 4096),
        Layer(2048, 384, 384),
        Layer(2048, 384, 1536),
        Layer(2048, 1536, 384),
        Layer(8192, 4096, 14336),
        Layer(512, 768, 768),
    ],
    [Layer(40, 48, 32, 16)],
)


def name_of(tile: tiles.Tile) -> str:
    return "{block_m}x{block_n}x{block_k} w{num_warps} s{num_stages}".format(**vars(tile))


def check(index: int) -> dict[str, Any]:
    """The worst error of a tile's forward and backward."""
    tile = tiles.Tile(*TILES[index])
    t = problem(*pick((300, 192, 320, 32), (40, 48, 32, 16)), "diag", BF16, device=DEVICE)
    factors = (t["u"], t["vh"], t["delta"])
    y, p = tma.spectral_linear_fwd(t["x"], t["w"], t["bias"], *factors, tile=tile)
    dx, grad = tma.spectral_linear_bwd(t["g"], p, t["w"], *factors, tile=tile)
    pairs = zip((y, p, dx, grad), exact(t, "diag"), strict=True)
    return {"worst": max(relative_error(got, want) for got, want in pairs)}


def parts(t: dict) -> dict[str, Callable[[], Any]]:
    """Products that a layer may be made of, by name; forward ones begin with "y", backward ones with "dx"."""
    both = torch.cat([t["w"], t["vh"]])  # [out + k, in]
    across = torch.cat([t["w"], t["u"]], dim=1)  # [out, in + k]
    p = t["x"] @ t["vh"].mT
    z = (p * t["delta"]).to(p.dtype)
    wide_p, wide_q = t["x"] @ both.mT, t["g"] @ across  # as their products leave them
    out, d = t["w"].shape

    def chain() -> tuple:
        p = t["x"] @ t["vh"].mT
        y = torch.addmm(t["bias"], (p * t["delta"]).to(p.dtype), t["u"].mT)
        return p, y.addmm_(t["x"], t["w"].mT)

    def chain_back() -> tuple:
        q = t["g"] @ t["u"]
        dx = (q * t["delta"]).to(q.dtype) @ t["vh"]
        return q, dx.addmm_(t["g"], t["w"])

    return {
        "y, p = x Vh^T": lambda: t["x"] @ t["vh"].mT,
        "y, b + z U^T": lambda: torch.addmm(t["bias"], z, t["u"].mT),
        "y, thin product first": chain,
        "y, [W; Vh] in one product": lambda: t["x"] @ both.mT,
        "y, p copied from there": lambda: wide_p[:, out:].clone(),
        "y, read as columns of it": lambda: wide_p[:, :out] + t["g"],
        "y, read by itself": lambda: t["g"] + t["g"],
        "dx, q = g U": lambda: t["g"] @ t["u"],
        "dx, thin product first": chain_back,
        "dx, [W, U] in one product": lambda: t["g"] @ across,
        "dx, gradient from there in one launch": lambda: reduce_diagonal(wide_q[:, d:], p),
        "dx, gradient by ATen": lambda: (wide_q[:, d:].float() * p).sum(0),
        "dx, g U and gradient by sigma_grad": lambda: sigma_grad(t["g"], t["u"], p),
    }


def by_tile(t: dict, way: str, tile: tiles.Tile) -> Any:
    """The fused forward ("y") or backward ("dx") with this tile."""
    factors = (t["u"], t["vh"], t["delta"])
    if way == "y":
        return tma.spectral_linear_fwd(t["x"], t["w"], t["bias"], *factors, tile=tile)
    return tma.spectral_linear_bwd(t["g"], t["p"], t["w"], *factors, tile=tile)


def measure(layer: Layer, way: str, right: list[int], rows: Record) -> None:
    """One direction of a layer by every tile, and its parts, over the frozen layer's."""
    everything = sets(layer)
    for t in everything:
        t["p"] = t["x"] @ t["vh"].mT

    def graph(call: Callable[[dict], Any]) -> device.Step:
        return device.graphed(lambda: [call(t) for t in everything], launches=True)

    steps = {}
    for index in right:
        tile = tiles.Tile(*TILES[index])
        steps[name_of(tile)] = graph(functools.partial(by_tile, way=way, tile=tile))
    products = [parts(t) for t in everything]
    for name in products[0]:
        if name.startswith(way):
            calls = [product[name] for product in products]
            steps[name] = device.graphed(functools.partial(each, calls), launches=True)
    plain = [
        frozen(t)[0] if way == "y" else functools.partial(frozen(t)[1], None) for t in everything
    ]
    floor = device.graphed(functools.partial(each, plain))
    timing = harness.pairwise(floor, steps, ROUNDS, warmup=1, clock=device.on_device)
    rows.add(
        f"{layer} {way}",
        frozen_us=1e3 * timing.floor_ms / len(everything),
        noise=timing.noise,
        ratios={name: timing.ratios[name].median for name in steps},
    )


def each(calls: list[Callable[[], Any]]) -> list:
    return [call() for call in calls]


def main() -> int:
    rows = Record("tune")
    right: list[int] = []

    def answered(index: int, result: dict[str, Any]) -> None:
        name = name_of(tiles.Tile(*TILES[index]))
        if "worst" in result and result["worst"] <= tolerance(BF16):
            right.append(index)
            rows.add(name, **result)
        else:
            rows.fail(name, result.get("error", result))

    ends = time.time() + COMPILING * record.left()
    workers.run("gpu.tune", range(len(TILES)), PROCESSES, PATIENCE, answered, ends)
    for layer in LAYERS:
        for way in ("y", "dx"):
            name = f"{layer} {way}"
            if rows.enough(3, name):
                with rows.row(name):
                    measure(layer, way, sorted(right), rows)
                device.free()
    return rows.status()


if __name__ == "__main__":
    sys.exit(main())
