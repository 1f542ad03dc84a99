"""The paper's Figures 1 and 2: how far runs that differ in their seed alone disagree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fine_bench.metrics.intervals import Interval
from fine_bench.report.figures.benchmark import (
    Array,
    named,
    panels_of,
    reach,
    title_of,
)
from fine_bench.report.figures.style import BLACK, GREY, LINES, Look, canvas, span, styled
from fine_bench.report.figures.titles import TARGET_TITLES

SEED_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Bar:
    """Consistency of a method: Jaccard@k as it is, and corrected for chance."""

    label: str
    raw: Interval
    corrected: Interval
    n_seeds: int
    note: str = ""


@dataclass(frozen=True)
class Ranks:
    """Ranks of a method's scores: ``(n_seeds, n_train)``, in percent, 100 the most suspicious."""

    label: str
    percent: Array


@styled
def losses_vary(
    losses: Mapping[int, Sequence[float]],
    ranks: Sequence[Ranks],
    looks: Mapping[str, Look],
    *,
    seeds: Sequence[int],
    target: str,
    size: str,
) -> Figure:
    """The paper's Figure 1: runs that differ in their seed alone end with different verdicts.

    Left: test loss by epoch. Middle: the rank of one example in each run, by the first method of
    each family and by random scores; it is the example whose rank moves by the median amount (mean
    over all methods). Right: how far the examples' ranks move, median and quartiles over examples.

    Args:
        losses: test loss of every epoch, by seed.
        ranks: of each method, rows in the order of ``seeds``, the same examples in all.
        looks: by label.
        seeds: run seeds, at least two.
        target: which target the ranks belong to.
        size: task and n, for the title.
    """
    figure = canvas(11.0, max(3.9, 2.3 + 0.21 * len(ranks)))
    title_of(figure, "Training again with another seed moves losses and scores", size)
    grid = figure.subplots(1, 3, width_ratios=[1.0, 1.15, 1.0])
    left, middle, right = grid
    for i, (seed, values) in enumerate(sorted(losses.items())):
        left.plot(
            np.arange(1, len(values) + 1),
            values,
            color=SEED_COLOURS[i % len(SEED_COLOURS)],
            linestyle=LINES[(i // 2) % len(LINES)] if len(losses) > 6 else LINES[i % len(LINES)],
            linewidth=1.2,
            label=f"seed {seed}",
        )
    if len(losses) <= 8:
        left.legend()
    left.set_title(f"Test loss, {len(losses)} seeds", loc="left")
    left.set_xlabel("epoch")
    left.set_ylabel("mean test loss (nats)")

    moves = {r.label: np.ptp(r.percent, axis=0) for r in ranks}
    methods = [r for r in ranks if not looks[r.label].control]
    one = median_mover([r.percent for r in methods or ranks])
    guess = [r for r in ranks if r.label == "random"]
    of_family = {looks[r.label].colour: r for r in reversed(methods)}
    drawn = [r for r in methods if of_family[looks[r.label].colour] is r][:6]
    drawn = [*drawn, *guess] or list(ranks)[:6]
    place_of = np.arange(len(seeds))
    for r in drawn:
        look = looks[r.label]
        middle.plot(
            place_of,
            r.percent[:, one],
            color=look.colour,
            marker=look.marker,
            linestyle=look.line,
            label=r.label,
            markerfacecolor=look.face,
        )
    middle.set_xticks(place_of, [str(s) for s in seeds])
    middle.set_xlim(-0.3, len(seeds) - 0.7)
    middle.set_ylim(0, 100)
    middle.set_title(f"Rank of training example {one}, target {target}", loc="left")
    middle.set_xlabel("run seed")
    middle.set_ylabel("rank, % of examples\n(100 = most suspicious)")
    middle.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)

    order = sorted(ranks, key=lambda r: (float(np.median(moves[r.label])), r.label))
    for y, r in enumerate(order):
        look = looks[r.label]
        low, centre, high = np.quantile(moves[r.label], [0.25, 0.5, 0.75])
        right.plot([low, high], [y, y], color=look.colour, linewidth=3.0, alpha=0.45)
        right.plot(
            centre, y, color=look.colour, marker=look.marker, markerfacecolor=look.face, zorder=3
        )
    right.set_yticks(range(len(order)), [r.label for r in order])
    right.set_ylim(len(order) - 0.4, -0.6)
    right.set_xlim(left=0)
    n_train = ranks[0].percent.shape[1] if ranks else 0
    right.set_title(f"Movement of all {n_train:,} ranks", loc="left")
    right.set_xlabel(
        f"highest − lowest rank over {len(seeds)} seeds,\n% of examples (median and quartiles)"
    )
    right.grid(axis="y", visible=False)
    return figure


def median_mover(percents: Sequence[Array]) -> int:
    """The example whose movement, averaged over the methods, is the (lower) median.

    Args:
        percents: of each method, ``(n_seeds, n_train)``.
    """
    movement = np.mean([np.ptp(p, axis=0) for p in percents], axis=0)
    return int(np.argsort(movement, kind="stable")[(len(movement) - 1) // 2])


@styled
def consistency_bars(
    panels: Mapping[str, Sequence[Bar]],
    looks: Mapping[str, Look],
    *,
    k: int,
    size: str,
    titles: Mapping[str, str] = TARGET_TITLES,
) -> Figure:
    """The paper's Figure 2: Jaccard@k between runs, beside the same corrected for chance.

    Args:
        panels: bars by target.
        looks: by label.
        k: size of the compared sets.
        size: task and n, for the title.
        titles: of the targets.
    """
    most = max((len(bars) for bars in panels.values()), default=1)
    figure = canvas(max(6.8, 5.1 * len(panels) + 0.3), 1.9 + 0.36 * most)
    title_of(figure, f"The same {k:,} most suspicious examples in another run?", size)
    for target, axes in zip(panels, panels_of(figure, list(panels)), strict=True):
        bars = sorted(panels[target], key=lambda b: (-_or(b.raw.mean, -math.inf), b.label))
        for y, bar in enumerate(bars):
            look = looks[bar.label]
            for offset, value, solid in ((-0.19, bar.raw, True), (0.19, bar.corrected, False)):
                if not math.isfinite(value.mean):
                    text = "undefined: says the same of all examples" if solid else ""
                    axes.text(0.01, y, text, va="center", fontsize=8, color=GREY)
                    continue
                axes.barh(
                    y + offset,
                    value.mean,
                    height=0.36,
                    facecolor=look.colour if solid else "white",
                    edgecolor=look.colour,
                    hatch=None if solid else "/////",
                    alpha=0.55 if solid and look.control else 1.0,
                    zorder=2,
                )
                if math.isfinite(value.lower):
                    axes.errorbar(
                        value.mean,
                        y + offset,
                        xerr=np.array(reach(value))[:, None],
                        color=BLACK,
                        elinewidth=1.0,
                        capsize=2.0,
                        zorder=3,
                    )
        seeds = max((b.n_seeds for b in bars), default=0)
        written = [named(b.label, b.n_seeds, seeds, b.note) for b in bars]
        # a long name would leave no room for its bar
        axes.set_yticks(range(len(bars)), [n.replace(" (", "\n(", 1) for n in written])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        ends = [x for b in bars for x in (b.corrected.mean, b.corrected.lower) if math.isfinite(x)]
        lowest = min([0.0, *ends])
        axes.set_xlim(lowest - 0.01 if lowest < 0 else 0.0, 1.0)
        axes.grid(axis="y", visible=False)
        axes.set_title(titles.get(target, f"target {target}"), loc="left")
        axes.set_xlabel(f"Jaccard@{k:,}, mean over pairs of {span(b.n_seeds for b in bars)} seeds")
    figure.legend(
        handles=[
            Patch(facecolor=GREY, edgecolor=GREY, label="as it is (as in the paper)"),
            Patch(facecolor="white", edgecolor=GREY, hatch="/////", label="corrected for chance"),
        ],
        loc="outside lower left",
        ncols=2,
    )
    return figure


def _or(value: float, instead: float) -> float:
    return value if math.isfinite(value) else instead
