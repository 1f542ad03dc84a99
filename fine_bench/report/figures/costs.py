"""What a method costs beyond plain training, against how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fine_bench.metrics.registry import Source
from fine_bench.report.figures.benchmark import (
    MethodPoint,
    draw_points,
    legend_of_kinds,
    limits,
    name_points,
    panels_of,
    title_of,
)
from fine_bench.report.figures.requirements import LeftOutError, in_full, interval_of
from fine_bench.report.figures.style import Look, canvas, settle, styled
from fine_bench.report.figures.tables import TableResults
from fine_bench.report.figures.titles import TARGET_TITLES

QUALITY: Mapping[str, float] = {"fidelity": 0.0, "lds": 0.0, "auroc": 0.5}
"""Measures by name, the most telling first, and what guessing reaches."""

STABLE = "stable_recall"

GUESSING = 0.05
"""A control this near to guessing would squeeze the others together, and is written below."""


@dataclass(frozen=True)
class CostPanel:
    """One target: ``points`` have seconds as ``x`` and ``measure``, of ``source``, as ``y``."""

    measure: str
    points: Sequence[MethodPoint]
    source: Source = "metrics"


@styled
def cost_and_quality(
    panels: Mapping[str, CostPanel],
    looks: Mapping[str, Look],
    *,
    size: str,
    title: str = "What a better answer costs",
    titles: Mapping[str, str] = TARGET_TITLES,
) -> Figure:
    """Quality against extra seconds (logarithmic), one panel a target, a name at every point.

    Args:
        panels: by target.
        looks: by label.
        size: task and n, for the title.
        title: what is shown.
        titles: of the targets.
    """
    figure = canvas(max(6.8, 5.0 * len(panels) + 0.3), 4.7)
    title_of(figure, title, size)
    axes_of = dict(zip(panels, panels_of(figure, list(panels)), strict=True))
    inside: dict[str, list[MethodPoint]] = {}
    for target, axes in axes_of.items():
        inside[target] = _draw(axes, panels[target], looks)
        axes.set_title(titles.get(target, f"target {target}"), loc="left")
    legend_of_kinds(figure)
    settle(figure)  # the labels are placed for this layout
    most = max((p.n_seeds for panel in panels.values() for p in panel.points), default=0)
    for target, axes in axes_of.items():
        name_points(axes, inside[target], looks, most)
    return figure


def _draw(axes: Axes, panel: CostPanel, looks: Mapping[str, Look]) -> list[MethodPoint]:
    """The points of a panel; returns those that are on the scale."""
    chance = QUALITY.get(panel.measure, 0.0)
    points = sorted(panel.points, key=lambda p: p.label)
    shown = [p for p in points if not _guesses(p, looks[p.label], chance)]
    shown = shown or [p for p in points if math.isfinite(p.y.mean)]
    axes.set_xscale("log")
    draw_points(axes, shown, looks)
    if shown:
        axes.set_ylim(*limits([p.y for p in shown]))
        costs = [p.x.mean for p in shown]
        axes.set_xlim(min(costs) / 2.5, max(costs) * 2.5)
        # within two decades powers of ten are too few, and all digits too many
        narrow = max(costs) < 100 * min(costs)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if narrow else (1.0,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if narrow:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    notes = [f"off the scale: {_note(p)}" for p in points if p not in shown]
    axes.set_xlabel("\n".join([in_full("cost", "seconds"), *notes]))
    axes.set_ylabel(_quality(panel))
    return shown


def _quality(panel: CostPanel) -> str:
    label = in_full(panel.source, panel.measure)
    return f"detection: {label}" if panel.measure == "auroc" else label


def _guesses(point: MethodPoint, look: Look, chance: float) -> bool:
    if not math.isfinite(point.y.mean):
        return True
    return look.control and abs(point.y.mean - chance) < GUESSING


def _note(point: MethodPoint) -> str:
    y = f"{round(point.y.mean, 2) + 0.0:.2f}" if math.isfinite(point.y.mean) else "undefined"
    return f"{point.label}, {y}, {point.x.mean:.2g} s"


def draw(results: TableResults) -> Figure:
    """The figure of a table: fidelity where a target has it, else LDS, else AUROC."""
    panels: dict[str, CostPanel] = {}
    for target in results.targets:
        for measure in QUALITY:
            points = _points(results, target, "metrics", measure)
            if points:
                panels[target] = CostPanel(measure, points)
                break
    if not panels:
        raise LeftOutError(
            "no method has both a cost in seconds and a fidelity, LDS or AUROC; these need a "
            "retraining truth or known bad examples"
        )
    return cost_and_quality(
        panels,
        results.looks,
        size=f"{results.size}; mean and 95 % interval over seeds",
        titles=results.titles,
    )


def draw_stable(results: TableResults) -> Figure:
    """What every run finds against cost: utility and consistency in one number."""
    panels: dict[str, CostPanel] = {}
    for target in results.targets:
        points = _points(results, target, "consistency", STABLE)
        if points:
            panels[target] = CostPanel(STABLE, points, "consistency")
    if not panels:
        raise LeftOutError(
            "no method has both a cost in seconds and a number of what all runs find; it needs "
            "known bad examples, and the scores of at least two seeds"
        )
    return cost_and_quality(
        panels,
        results.looks,
        size=results.size,
        title="What is found in every run, and its cost",
        titles=results.titles,
    )


def _points(results: TableResults, target: str, source: Source, measure: str) -> list[MethodPoint]:
    points = []
    for row in results.rows(target):
        x, y = interval_of(row, "cost", "seconds"), interval_of(row, source, measure)
        # a logarithmic axis has no place for what was not measured
        if x is not None and y is not None and x.mean > 0:
            points.append(MethodPoint(row.label, x, y, len(row.seeds)))
    return points
