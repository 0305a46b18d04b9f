"""The pictures of `fastspec analyze`; every function takes results and writes one PNG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastspec.studies.analyze.alignment import Alignment, random_block
from fastspec.studies.analyze.gradients import GradientSpectrum
from fastspec.studies.analyze.stability import RunAlignment, within_groups
from fastspec.studies.analyze.transplant import Scored

KINDS = ("attention", "mlp", "other")
SMOOTHING = 9
COLOURS = {"attention": "C0", "mlp": "C1", "other": "C2"}


@contextmanager
def figure(
    path: Path, columns: int, rows: int = 1, width: float = 4.6, **kwargs: Any
) -> Iterator[Any]:
    """Axes [rows][columns] of a figure that is written to `path` afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, 3.5 * rows),
        layout="constrained",
        squeeze=False,
        **kwargs,
    )
    try:
        yield axes
        for each in axes.flat:
            each.grid(alpha=0.25)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, dpi=110)
    finally:
        plt.close(fig)


def of_kind(alignments: Sequence[Alignment]) -> dict[str, list[Alignment]]:
    """Alignments by kind, of the kinds that occur."""
    found = {kind: [a for a in alignments if a.kind == kind] for kind in KINDS}
    return {kind: group for kind, group in found.items() if group}


def attention_and_mlp(alignments: Sequence[Alignment]) -> dict[str, list[Alignment]]:
    """`of_kind` without the rest, unless there is nothing else: three panels are too small to read."""
    groups = of_kind(alignments)
    return {kind: group for kind, group in groups.items() if kind != "other"} or groups


def matched_chance(group: Sequence[Alignment]) -> float:
    """Mean |cosine| of two random vectors, sqrt(2 / (pi n)), over the sides of the matrices."""
    sides = [side for a in group for side in a.shape]
    return sum((2 / (torch.pi * side)) ** 0.5 for side in sides) / len(sides)


def draw_alignment(alignments: Sequence[Alignment], path: Path) -> None:
    """Matched cosines by rank and layer beside those of clusters, attention and MLP apart."""
    from matplotlib import colormaps

    groups = attention_and_mlp(alignments)
    with figure(path, 2, len(groups), sharex="row", sharey=True) as axes:
        for row, (kind, group) in zip(axes, groups.items(), strict=True):
            layers = sorted({a.layer or 0 for a in group})
            for i, layer in enumerate(layers):
                colour = colormaps["viridis"](i / max(1, len(layers) - 1))
                ours = [a for a in group if (a.layer or 0) == layer]
                for panel, names in zip(
                    row, (("left", "right"), ("cluster_left", "cluster_right")), strict=True
                ):
                    x, y = _mean_curve([getattr(a, n) for a in ours for n in names])
                    panel.plot(x, _smooth(y), color=colour, linewidth=1.2, label=f"layer {layer}")
            row[0].axhline(matched_chance(group), color="0.3", linestyle=":", label="chance")
            x, y = _mean_curve([a.cluster_chance for a in group])
            row[1].plot(x, y, ":", color="0.3", label="chance")
            row[0].set(title=f"{kind}: matched singular vectors", ylabel="|cosine|")
            row[1].set(title=f"{kind}: spans of clusters")
            row[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        for panel in axes[-1]:
            panel.set(
                xlabel=f"rank (mean of {SMOOTHING} neighbours; 1 is the largest)", ylim=(0, 1.02)
            )


def draw_profile(alignments: Sequence[Alignment], path: Path) -> None:
    """Cosines by tenth of the rank range: matched vectors, spans, and what chance gives."""
    groups = attention_and_mlp(alignments)
    with figure(path, len(groups), sharey=True) as axes:
        for panel, (kind, group) in zip(axes[0], groups.items(), strict=True):
            most = max(len(a.blocks) for a in group)
            whole = [a.blocks for a in group if len(a.blocks) == most]
            mean = torch.stack(whole).mean(0)
            x = [100 * (i + 0.5) / most for i in range(most)]
            panel.plot(x, mean[:, 1], "o-", color="C0", label="span of the range")
            panel.plot(x, mean[:, 0], "s-", color="C1", label="matched vectors")
            panel.plot(x, mean[:, 2], ":", color="C0", label="random spans")
            panel.axhline(matched_chance(group), color="C1", linestyle=":", label="random vectors")
            panel.set(
                title=f"{kind}, mean of {len(group)} matrices",
                xlabel="rank range, per cent of all",
                ylim=(0, 1.02),
            )
        axes[0][0].set_ylabel("mean cosine, before to after")
        axes[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_update(alignments: Sequence[Alignment], path: Path) -> None:
    """Size of the update by layer, and how much of it and of the weight leading directions hold."""
    with figure(path, 2) as axes:
        size, share = axes[0]
        for kind, group in of_kind(alignments).items():
            places = [a.layer if a.layer is not None else -1 for a in group]
            ratios = [float(a.s_update[0] / a.s[0]) for a in group]
            size.plot(places, ratios, "o", color=COLOURS[kind], alpha=0.7, label=kind)
            if kind == "other":
                continue
            x, y = _mean_curve([a.explained() for a in group], relative=True)
            share.plot(x, y, color=COLOURS[kind], label=f"W, {kind}")
            x, y = _mean_curve([a.update_captured for a in group], relative=True)
            share.plot(x, y, "--", color=COLOURS[kind], label=f"update, {kind}")
            x, y = _mean_curve([random_block(a.shape) for a in group], relative=True)
            share.plot(x, y, ":", color=COLOURS[kind], label=f"random block, {kind}")
        places = sorted({-1 if a.layer is None else a.layer for a in alignments})
        size.set_xticks(places, ["none" if place < 0 else str(place) for place in places])
        size.set(
            xlabel="layer",
            ylabel="$\\sigma_1(dW) / \\sigma_1(W)$",
            title="size of the update",
            yscale="log",  # a head that was never pretrained moves a hundred times as far
        )
        share.set(
            xlabel="leading directions, per cent of all",
            ylabel="share of the squared norm",
            title="what the leading directions hold",
        )
        size.legend(fontsize="small")
        share.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_scores(scored: Sequence[Scored], path: Path, title: str, xlabel: str, ylabel: str) -> None:
    """Score against the share of triplets changed, a line for each kind of change."""
    own = next(s.score for s in scored if s.what == "own")
    with figure(path, 1, width=6.2) as axes:
        panel = axes[0][0]
        for i, what in enumerate(dict.fromkeys(s.what for s in scored if s.what != "own")):
            points = sorted((100 * s.share, s.score) for s in scored if s.what == what)
            line = "osD^v"[i % 5] + ("--" if what.endswith("spans") else "-")
            panel.plot(*zip((0.0, own), *points, strict=True), line, label=what)
        panel.axhline(own, color="0.4", linestyle=":", label="unchanged")
        panel.set_xscale("symlog", linthresh=1, linscale=0.5)
        ticks = sorted({0.0, *(100 * s.share for s in scored)})
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(0, None))
        panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_gradients(spectra: Sequence[GradientSpectrum], path: Path) -> None:
    """Spectra of summed gradients, relative to their largest value, and what the basis holds of them;
    attention and MLP apart."""
    steps = sorted({g.step for g in spectra})
    kinds = [k for k in KINDS if any(g.kind == k for g in spectra)]
    kinds = [k for k in kinds if k != "other"] or kinds
    with figure(path, 2, len(kinds), sharex=True, sharey="col") as axes:
        for (left, right), kind in zip(axes, kinds, strict=True):
            for i, step in enumerate(steps):
                ours = [g for g in spectra if g.step == step and g.kind == kind]
                label = f"after step {step}"
                x, y = _mean_curve([g.s / g.s[0] for g in ours], relative=True)
                left.semilogy(x, y, color=f"C{i}", label=label)
                x, y = _mean_curve([g.captured for g in ours], relative=True)
                right.plot(x, y, color=f"C{i}", label=label)
            x, y = _mean_curve([random_block(g.shape) for g in ours], relative=True)
            right.plot(x, y, ":", color="0.3", label="random block")
            left.set(
                title=f"{kind}: summed gradient",
                ylabel="singular value over the largest",
                ylim=(1e-4, 1.2),
            )
            right.set(title=f"{kind}: in the basis of W", ylabel="share of the squared norm")
            left.legend(fontsize="small")
            right.legend(fontsize="small")
        axes[-1][0].set_xlabel("rank, per cent of all")
        axes[-1][1].set_xlabel("leading directions of W, per cent of all")


def draw_runs(runs: Sequence[RunAlignment], path: Path) -> None:
    """Subspace cosine of the leading tenth against the score, both less the mean of their group; a colour for
    each task, a marker for each method, kind of labels and start."""
    labels = list(dict.fromkeys(run.label for run in runs))
    tasks = sorted({run.task for run in runs})
    score = within_groups(runs, torch.tensor([run.best for run in runs]))
    with figure(path, 2, width=5.2, sharey=True) as axes:
        for panel, kind in zip(axes[0], ("attention", "mlp"), strict=True):
            column = f"{kind}: subspace, leading tenth"
            found = [run.summary()[column] for run in runs]
            cosines = within_groups(runs, torch.tensor([float(x or 0) for x in found]))
            for run, x, y in zip(runs, cosines.tolist(), score.tolist(), strict=True):
                marker = "osD^vP*X<>"[labels.index(run.label) % 10]
                panel.plot(x, y, marker, color=f"C{tasks.index(run.task) % 10}", alpha=0.8)
            panel.set(title=kind, xlabel="stability less its group's mean [cosine]")
            panel.ticklabel_format(axis="x", scilimits=(-2, 2))
            panel.locator_params(axis="x", nbins=5)
        axes[0][0].set_ylabel("best dev score less its group's mean [points]")
        for i, task in enumerate(tasks):
            axes[0][1].plot([], [], "s", color=f"C{i % 10}", label=task)
        for i, label in enumerate(labels):
            axes[0][1].plot(
                [], [], "osD^vP*X<>"[i % 10], color="0.4", fillstyle="none", label=label
            )
        axes[0][1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_scale(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Cosines under post-training against the number of pretraining images; spread over seeds."""
    sizes = sorted({row["images"] for row in rows})
    seeds = len({row["seed"] for row in rows})
    with figure(path, 2) as axes:
        for panel, columns, ylabel in (
            (axes[0][0], ("matched cosine", "subspace cosine"), "leading tenth, before to after"),
            (axes[0][1], ("accuracy",), "test accuracy [%]"),
        ):
            for i, column in enumerate(columns):
                values = [[r[column] for r in rows if r["images"] == size] for size in sizes]
                middle = torch.tensor([sorted(v)[len(v) // 2] for v in values])
                low = middle - torch.tensor([min(v) for v in values])
                high = torch.tensor([max(v) for v in values]) - middle
                panel.errorbar(
                    range(len(sizes)),
                    middle,
                    yerr=torch.stack([low, high]).numpy(),
                    fmt="os"[i] + "-",
                    capsize=3,
                    label=column,
                )
            if "subspace cosine" in columns:
                level = sum(row["random spans"] for row in rows) / len(rows)
                panel.axhline(level, color="C1", linestyle=":", label="subspace, by chance")
                # above that line, which lies far below all else
                panel.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0.0, 0.12))
            panel.set_xticks(range(len(sizes)), [f"{size:,}" if size else "none" for size in sizes])
            panel.set(
                xlabel=f"pretraining images (median, least to largest of {seeds} seeds)",
                ylabel=ylabel,
            )
        axes[0][0].set_title("stability under post-training")
        axes[0][1].set_title("classification after post-training")


def _smooth(values: torch.Tensor) -> torch.Tensor:
    """The mean of each value and its neighbours, fewer of them at the ends."""
    half = SMOOTHING // 2
    return torch.stack([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _mean_curve(curves: Sequence[Any], relative: bool = False) -> tuple[Any, Any]:
    """The mean of curves over the rank, of those of the commonest length; x in ranks or per cent."""
    lengths = [len(c) for c in curves]
    k = max(set(lengths), key=lengths.count)
    mean = torch.stack([c.double() for c in curves if len(c) == k]).mean(0)
    x = torch.arange(1, k + 1)
    return (100 * x / k if relative else x), mean
