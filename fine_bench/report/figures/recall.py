"""Recall of the bad examples against the share inspected, in panels of a few methods each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from fine_bench.report.figures.benchmark import named, title_of
from fine_bench.report.figures.style import BLACK, PALE, Look, canvas, styled
from fine_bench.report.figures.titles import TARGET_TITLES

Array = NDArray[np.float64]

F_INE, OTHERS, CONTROLS = "f-INE", "other methods", "controls"
TOGETHER = 6
"""So many curves can be told apart in one panel."""
POINTS = 48
"""Of a curve within the part that is shown."""
BEHIND = 4
"""One point in so many is enough for a curve behind the others."""


@dataclass(frozen=True)
class Recall:
    """Recall curves of a method: ``share`` (n_points,), ``recall`` (n_seeds, n_points)."""

    label: str
    share: Array
    recall: Array

    @property
    def area(self) -> float:
        """Under the mean over seeds, from nothing inspected to everything."""
        mean = self.recall.mean(axis=0)
        return float((np.diff(self.share) * (mean[1:] + mean[:-1]) / 2).sum())


def shown_up_to(rate: float) -> float:
    """The share of the examples at which the figure ends: there is little to see beyond it.

    Args:
        rate: share of bad examples, in (0, 1).
    """
    return min(1.0, max(3 * rate, 0.1))


def points_for(rate: float) -> int:
    """Points of a whole curve of which ``POINTS`` lie in the part that is shown."""
    return round(POINTS / shown_up_to(rate)) + 1


def grouped(curves: Sequence[Recall], looks: Mapping[str, Look]) -> dict[str, list[Recall]]:
    """Methods that are read together: f-INE, other methods, controls; each by its area."""
    ordered = sorted(curves, key=lambda c: (-c.area, c.label))
    if len(ordered) <= TOGETHER:
        return {"": ordered}
    groups: dict[str, list[Recall]] = {F_INE: [], OTHERS: [], CONTROLS: []}
    for curve in ordered:
        look = looks[curve.label]
        kind = CONTROLS if look.control else F_INE if look.family.startswith("f-INE") else OTHERS
        groups[kind].append(curve)
    return {name: some for name, some in groups.items() if some}


@styled
def recall_curves(
    panels: Mapping[str, Sequence[Recall]],
    looks: Mapping[str, Look],
    *,
    rate: float,
    size: str,
    titles: Mapping[str, str] = TARGET_TITLES,
) -> Figure:
    """Recall of the bad examples against the share inspected: a row a target, a panel a group.

    Mean over seeds; the band reaches from the lowest to the highest seed. The best possible order
    (a line to recall 1 at the noise rate) and a random one are drawn, and the curves of the other
    groups in grey behind them. Shares up to three times the noise rate are shown; the areas are
    those of whole curves.

    Args:
        panels: curves by target.
        looks: by label.
        rate: share of bad examples, in (0, 1).
        size: task and n, for the title.
        titles: of the targets.
    """
    rows = {target: grouped(curves, looks) for target, curves in panels.items()}
    columns = max((len(groups) for groups in rows.values()), default=1)
    heights = [
        3.3 + 0.16 * max((len(some) for some in groups.values()), default=0)
        for groups in rows.values()
    ]
    figure = canvas(max(6.8, 3.7 * columns + 0.3), 0.6 + sum(heights))
    title_of(figure, "Bad examples found by inspecting the most suspicious first", size)
    grid = figure.subplots(
        max(len(rows), 1), columns, squeeze=False,
        gridspec_kw={"height_ratios": heights or [1.0]},
    )  # fmt: skip
    for line, (target, groups) in zip(grid, rows.items(), strict=False):
        most = max((len(c.recall) for c in panels[target]), default=0)
        title = titles.get(target, f"target {target}")
        for axes in line[len(groups) :]:
            axes.set_axis_off()
        for number, (axes, (name, own)) in enumerate(zip(line, groups.items(), strict=False)):
            assert isinstance(axes, Axes)
            others = [c for kind, some in groups.items() if kind != name for c in some]
            _panel(axes, own, others, looks, rate, most)
            axes.set_title("\n".join([title if number == 0 else "", name]).rstrip(), loc="left")
            axes.set_xlabel("share of the examples inspected")
            if number == 0:
                axes.set_ylabel("recall: share of the bad found")
    return figure


def _panel(
    axes: Axes,
    own: Sequence[Recall],
    others: Sequence[Recall],
    looks: Mapping[str, Look],
    rate: float,
    most: int,
) -> None:
    end = shown_up_to(rate)
    axes.plot([0, rate, end], [0, 1, 1], color=BLACK, linewidth=1.0, label="optimal", zorder=1)
    axes.plot([0, end], [0, end], color=PALE, linewidth=1.0, label="random order", zorder=1)
    for curve in others:
        near = _near(curve, end)
        mean = curve.recall[:, near].mean(axis=0)[::BEHIND]
        axes.plot(curve.share[near][::BEHIND], mean, color=PALE, linewidth=0.6, alpha=0.7, zorder=1)
    for curve in own:
        look, near = looks[curve.label], _near(curve, end)
        share, recall = curve.share[near], curve.recall[:, near]
        axes.fill_between(
            share, recall.min(axis=0), recall.max(axis=0), color=look.colour, alpha=0.14,
            linewidth=0,
        )  # fmt: skip
        axes.plot(
            share,
            recall.mean(axis=0),
            color=look.colour,
            linestyle=look.line,
            marker=look.marker,
            markerfacecolor=look.face,
            markersize=4.5,
            markevery=(0.04, 0.14),
            linewidth=1.2 if look.control else 1.7,
            label=f"{named(curve.label, len(curve.recall), most)}  {curve.area:.3f}",
            zorder=2 if look.control else 3,
        )
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.02)
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = ScaledTranslation(0, -0.46, figure.dpi_scale_trans)  # inches: clear of the axis label
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        bbox_transform=axes.transAxes + below,
        title="method, area under the whole curve",
        title_fontsize=8,
        alignment="left",
        borderaxespad=0.0,
    )


def _near(curve: Recall, end: float) -> slice:
    """The points up to the end of what is shown, and one beyond it."""
    return slice(0, math.ceil(round(end * (len(curve.share) - 1), 6)) + 2)
