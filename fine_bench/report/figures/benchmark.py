"""Figures of the benchmark: plain arrays in, a figure out. Reading is done elsewhere."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from fine_bench.metrics.intervals import Interval
from fine_bench.report.figures.labels import Name, place
from fine_bench.report.figures.style import BLACK, GREY, Look, canvas, settle, styled
from fine_bench.report.figures.titles import TARGET_TITLES
from fine_bench.terminal import visible_lines

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MethodPoint:
    """A method in the plane of consistency (x) and detection (y), each with its interval."""

    label: str
    x: Interval
    y: Interval
    n_seeds: int
    note: str = ""


def title_of(figure: Figure, text: str, size: str = "") -> None:
    """What is shown, and below it of what and how many, in as many lines as the width asks for."""
    # measured before the figure is settled, so what ``style.settle`` does is done here
    text, size = visible_lines(text), visible_lines(size)
    words = size
    for narrower in range(len(size), 20, -4):
        words = "\n".join(textwrap.wrap(size, narrower))
        shown = f"{text}\n{words}" if size else text
        title = figure.suptitle(shown, x=0.01, ha="left", parse_math=False)
        if title.get_window_extent().width <= 0.98 * figure.bbox.width:
            return
    if not size:
        figure.suptitle(text, x=0.01, ha="left")


def named(label: str, n_seeds: int, most: int, note: str = "") -> str:
    """The name as written: with a note, and its number of seeds when others have more."""
    seeds = f"{n_seeds} of {most} seeds" if n_seeds != most else ""
    extra = ", ".join(part for part in (note, seeds) if part)
    if extra and label.endswith(")"):
        return f"{label[:-1]}, {extra})"
    return f"{label} ({extra})" if extra else label


def panels_of(figure: Figure, targets: Sequence[str]) -> list[Axes]:
    """One panel a target, side by side."""
    grid = figure.subplots(1, len(targets), squeeze=False)
    return [axes for axes in grid[0] if isinstance(axes, Axes)]


# ---------------------------------------------------------------------- detection, consistency


def reach(interval: Interval) -> tuple[float, float]:
    """Lengths of the bar to both sides; none where there is no interval."""
    if not math.isfinite(interval.lower):
        return 0.0, 0.0
    return max(interval.mean - interval.lower, 0.0), max(interval.upper - interval.mean, 0.0)


def limits(intervals: Sequence[Interval]) -> tuple[float, float]:
    """Around all intervals, with room for names; hardly beyond 1, which no measure exceeds."""
    ends = [x for i in intervals for x in (i.mean - reach(i)[0], i.mean + reach(i)[1])]
    low, high = min(ends), max(ends)
    pad = max(0.16 * (high - low), 0.002)
    return low - pad, min(high + pad, max(1.0, high) + 0.2 * pad)


@styled
def detection_and_consistency(
    panels: Mapping[str, Sequence[MethodPoint]],
    looks: Mapping[str, Look],
    *,
    x_label: str,
    y_label: str,
    size: str,
    titles: Mapping[str, str] = TARGET_TITLES,
) -> Figure:
    """Detection against cross-seed consistency, one panel a target, a name at every point.

    The axes show the range in which the methods lie. A control that guesses (consistency below
    0.1, as random scores have) would squeeze them all into a corner, so it is named in the
    panel's lower left instead, with its numbers; so are scores without a defined consistency.

    Args:
        panels: points by target.
        looks: by label.
        x_label, y_label: what consistency and detection are measured by.
        size: task and n, for the title.
        titles: of the targets.
    """
    figure = canvas(max(6.8, 5.0 * len(panels) + 0.3), 4.7)
    title_of(figure, "Finding bad examples, and finding the same ones again", size)
    axes_of = dict(zip(panels, panels_of(figure, list(panels)), strict=True))
    inside: dict[str, list[MethodPoint]] = {}
    for target, axes in axes_of.items():
        points = sorted(panels[target], key=lambda p: p.label)
        defined = [p for p in points if math.isfinite(p.x.mean) and math.isfinite(p.y.mean)]
        shown = [p for p in defined if not (looks[p.label].control and p.x.mean < 0.1)] or defined
        inside[target] = shown
        draw_points(axes, shown, looks)
        if shown:
            axes.set_xlim(*limits([p.x for p in shown]))
            axes.set_ylim(*limits([p.y for p in shown]))
        notes = [_off_scale(p) for p in points if p not in shown]
        if notes:
            axes.set_xlabel(f"{x_label}\n" + "\n".join(notes))
        else:
            axes.set_xlabel(x_label)
        axes.set_title(titles.get(target, f"target {target}"), loc="left")
        axes.set_ylabel(y_label)
    legend_of_kinds(figure)
    settle(figure)  # the labels are placed for this layout
    most = max((p.n_seeds for points in panels.values() for p in points), default=0)
    for target, axes in axes_of.items():
        name_points(axes, inside[target], looks, most)
    return figure


def draw_points(axes: Axes, points: Sequence[MethodPoint], looks: Mapping[str, Look]) -> None:
    """A marker for every method, with its intervals both ways."""
    for point in points:
        look = looks[point.label]
        axes.errorbar(
            point.x.mean,
            point.y.mean,
            xerr=np.array(reach(point.x))[:, None],
            yerr=np.array(reach(point.y))[:, None],
            color=look.colour,
            marker=look.marker,
            markerfacecolor=look.face,
            elinewidth=1.0,
            capsize=2.0,
            linestyle="none",
            zorder=3,
            clip_on=False,
        )


def name_points(
    axes: Axes, points: Sequence[MethodPoint], looks: Mapping[str, Look], most: int
) -> None:
    """The names of drawn points, beside them and clear of their intervals.

    Args:
        axes: whose layout is settled.
        points: those that are on the scale.
        looks: by label.
        most: seeds of the method that has most; fewer are said beside the name.
    """
    bars = [
        np.array(bar)
        for p in points
        for bar in (
            [(p.x.mean - reach(p.x)[0], p.y.mean), (p.x.mean + reach(p.x)[1], p.y.mean)],
            [(p.x.mean, p.y.mean - reach(p.y)[0]), (p.x.mean, p.y.mean + reach(p.y)[1])],
        )
    ]
    names = [
        Name(named(p.label, p.n_seeds, most, p.note), p.x.mean, p.y.mean, looks[p.label].ink)
        for p in points
    ]
    place(axes, names, bars)


def legend_of_kinds(figure: Figure) -> None:
    """Filled markers are methods, hollow ones controls."""
    figure.legend(
        handles=[_dot("method", BLACK, BLACK), _dot("control", GREY, "white")],
        loc="outside lower left",
        ncols=2,
    )


def _dot(text: str, colour: str, face: str) -> Line2D:
    return Line2D(
        [], [], linestyle="none", marker="o", color=colour, markerfacecolor=face, label=text
    )


def _off_scale(point: MethodPoint) -> str:
    # + 0.0 takes the minus from a zero
    x = f"{round(point.x.mean, 2) + 0.0:.2f}" if math.isfinite(point.x.mean) else "undefined"
    return f"off the scale: {point.label}, consistency {x}, detection {point.y.mean:.2f}"
