"""Fit the constants of the cost model (`fastspec.ops.plan.Costs`) to this machine, and say their worth.

Every plan worth weighing is timed on every problem, forward and backward, over the plain frozen layer
(forward and dx). What counts is the regret, the chosen plan's time over the best plan's: the fitted
constants are those of least regret, in the geometric mean. Fitted to one half of the problems and tried on
the other, they say whether the fit is worth anything beyond the noise; otherwise the constants in use stay.

    python bench/calibrate.py            # machine otherwise idle; some minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math

import harness
import numpy as np
import torch.nn.functional as F
from scipy.optimize import differential_evolution
from test_layers import basis, problem

from fastspec.ops.functional import spectral_linear
from fastspec.ops.plan import COSTS, Costs, LayerCall, Plan, weighed_plans, work_of

SIZES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
ROWS = (64, 512, 2048)
RANKS = (8, 16, 32, 64, 128, "full")
BUCKETS = (8, 16, 32, 64, 128, 1 << 30)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One layer and count of rows: every plan's time over the plain layer's."""

    call: LayerCall
    ratios: dict[Plan, float]

    def regret(self, costs: Costs) -> float:
        chosen = min(self.ratios, key=lambda plan: costs.of(work_of(plan, self.call), self.call.k))
        return self.ratios[chosen] / min(self.ratios.values())


def measure(n: int, k: int, factors, rounds: int) -> Measured:
    w = factors[0]
    out_features, in_features = w.shape
    p = problem(n, *factors, k)
    call = LayerCall(n, in_features, out_features, k)
    plans = weighed_plans(call)
    repeats = max(1, round(2e8 / (n * in_features * out_features)))

    def run(call):
        for _ in range(repeats):
            p.x.grad = p.delta.grad = None
            call().backward(p.g)

    def planned(plan):
        return lambda: run(
            lambda: spectral_linear(
                p.x, p.w, p.b, p.u, p.s, p.vh, p.delta, singular_basis=True, plan=plan
            )
        )

    timing = harness.pairwise(
        lambda: run(lambda: F.linear(p.x, p.w, p.b)),
        {str(plan): planned(plan) for plan in plans},
        rounds,
        warmup=1,
    )
    ratios = {plan: timing.ratios[str(plan)].median for plan in plans}
    return Measured(call, ratios)


def mean_regret(measured: list[Measured], costs: Costs) -> float:
    return math.exp(sum(math.log(m.regret(costs)) for m in measured) / len(measured))


def fit(measured: list[Measured]) -> Costs:
    """The prices of least regret. It is a step function of them, hence the search without gradients."""

    def costs(logarithms: np.ndarray) -> Costs:
        *thin, byte = (round(float(price), 2) for price in np.exp(logarithms))
        return Costs(tuple(zip(BUCKETS, thin, strict=True)), byte)

    limits = [(math.log(0.3), math.log(8))] * len(BUCKETS) + [(math.log(0.3), math.log(40))]
    start = [math.log(COSTS.thin_price(k)) for k in BUCKETS] + [math.log(COSTS.byte)]
    found = differential_evolution(
        lambda x: mean_regret(measured, costs(x)), limits, x0=start, rng=0, maxiter=60, popsize=8
    )
    return costs(found.x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    measured = []
    for size in SIZES:
        factors = basis(*size)
        for k, n in itertools.product(RANKS, ROWS):
            m = measure(n, min(size) if k == "full" else k, factors, rounds)
            measured.append(m)
            best = sorted(m.ratios.items(), key=lambda item: item[1])
            shown = ", ".join(f"{plan} {ratio:.2f}" for plan, ratio in best)
            layer = f"{n:5} rows, {m.call.in_features} -> {m.call.out_features}, k={m.call.k}"
            print(f"{layer}: {shown}", flush=True)
    harness.store(
        "calibrate",
        [
            {
                "n": m.call.n, "in": m.call.in_features, "out": m.call.out_features, "k": m.call.k,
                "ratios": {str(plan): ratio for plan, ratio in m.ratios.items()},
            }
            for m in measured
        ],
    )  # fmt: skip
    fitted = fit(measured)
    for name, costs in (("in use", COSTS), ("fitted", fitted)):
        worst = max(m.regret(costs) for m in measured)
        print(f"{name}: {costs}")
        print(f"  regret: geometric mean {mean_regret(measured, costs):.3f}, worst {worst:.3f}")
    halves = [measured[::2], measured[1::2]]
    for mine, other in (halves, halves[::-1]):
        print(
            f"fitted to one half, on the other: {mean_regret(other, fit(mine)):.3f};"
            f" in use: {mean_regret(other, COSTS):.3f}"
        )


if __name__ == "__main__":
    main()
