"""Fit the constants of the cost model (`fastspec.plan.Costs`) to this machine, and say what they are worth.

Every legal plan of every problem is timed, forward and backward, over the plain frozen layer (forward and
dx). The constants are the least-squares fit of what the plans add; beside them stands the regret, the
chosen plan's time over the best plan's, with the constants in use and with the fitted ones.

    python bench/calibrate.py            # machine otherwise idle; some minutes
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math

import harness
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from test_layers import basis, problem

from fastspec.functional import spectral_linear
from fastspec.plan import COSTS, Costs, Plan, legal_plans, work_of

SIZES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072)]
ROWS = (64, 512, 2048)
RANKS = (8, 16, 32, 64, 128, "full")
BUCKETS = (8, 16, 32, 64, 128, 1 << 30)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One layer and count of rows: every plan's time over the plain layer's."""

    n: int
    in_features: int
    out_features: int
    k: int
    ratios: dict[Plan, float]

    @property
    def plain_flops(self) -> int:
        return 4 * self.n * self.in_features * self.out_features

    def regret(self, costs: Costs) -> float:
        chosen = min(self.ratios, key=lambda plan: costs.of(self.work(plan), self.k))
        return self.ratios[chosen] / min(self.ratios.values())

    def work(self, plan: Plan):
        return work_of(plan, self.n, self.in_features, self.out_features, self.k)


def measure(n: int, k: int, factors, rounds: int) -> Measured:
    w = factors[0]
    out_features, in_features = w.shape
    p = problem(n, *factors, k)
    plans = legal_plans(
        in_features, out_features, k, core="diag", dtype=torch.float32, device="cpu",
        needs_dx=True, needs_delta=True, singular_basis=True,
    )  # fmt: skip
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
    return Measured(n, in_features, out_features, k, ratios)


def fit(measured: list[Measured]) -> Costs:
    """Prices by which the measured ratios come closest to the model's, each problem weighing the same."""
    rows, values = [], []
    for m in measured:
        for plan, ratio in m.ratios.items():
            work = m.work(plan)
            row = [0.0] * (len(BUCKETS) + 2)
            row[next(i for i, limit in enumerate(BUCKETS) if m.k <= limit)] = work.thin_flops
            row[-2] = work.bytes
            row[-1] = 1  # what a call costs whatever its plan
            rows.append(np.array(row) / m.plain_flops)
            values.append(ratio - 1 - work.flops / m.plain_flops)
    prices, _ = nnls(np.array(rows), np.array(values))
    thin = tuple((limit, round(float(c), 2)) for limit, c in zip(BUCKETS, prices, strict=False))
    return Costs(thin, round(float(prices[-2]), 2))


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
            print(f"{n:5} rows, {m.in_features} -> {m.out_features}, k={m.k}: {shown}", flush=True)
    fitted = fit(measured)
    for name, costs in (("in use", COSTS), ("fitted", fitted)):
        regrets = [m.regret(costs) for m in measured]
        mean = math.exp(sum(map(math.log, regrets)) / len(regrets))
        print(f"{name}: {costs}\n  regret: geometric mean {mean:.3f}, worst {max(regrets):.3f}")
    harness.store(
        "calibrate",
        {
            "costs": dataclasses.asdict(fitted),
            "problems": [
                dataclasses.asdict(m) | {"ratios": {str(p): r for p, r in m.ratios.items()}}
                for m in measured
            ],
        },
    )


if __name__ == "__main__":
    main()
