"""Agreement with retraining, beside the highest value that the truth's own noise allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fine_bench.metrics.intervals import Interval
from fine_bench.report.figures.benchmark import named, panels_of, reach, title_of
from fine_bench.report.figures.requirements import LeftOutError, in_full, interval_of
from fine_bench.report.figures.style import BLACK, GREY, Look, canvas, styled
from fine_bench.report.figures.tables import TableResults
from fine_bench.report.figures.titles import TARGET_TITLES

MEASURES: Mapping[str, str] = {
    "fidelity": "all examples",
    "fidelity_clean": "clean examples only",
    "lds": "single queries",
}
"""Metric: what it covers; its ceiling follows from ``…_of_ceiling``."""


@dataclass(frozen=True)
class MethodFidelity:
    """A method's agreement by measure: ``values[measure]`` is a mean with its interval."""

    label: str
    n_seeds: int
    values: Mapping[str, Interval]


@dataclass(frozen=True)
class FidelityPanel:
    """One target: its methods, and the noise ceiling of each measure (absent if unknown)."""

    methods: Sequence[MethodFidelity]
    ceilings: Mapping[str, float]

    @property
    def measures(self) -> list[str]:
        """Those that some method has."""
        return [name for name in MEASURES if any(name in m.values for m in self.methods)]


_LINES: Mapping[str, Any] = {"fidelity": "-", "fidelity_clean": "--", "lds": ":"}
"""How the ceiling of a measure is drawn."""


@styled
def fidelity_and_ceiling(
    panels: Mapping[str, FidelityPanel],
    looks: Mapping[str, Look],
    *,
    size: str,
    titles: Mapping[str, str] = TARGET_TITLES,
) -> Figure:
    """A line a method, best first; the ceilings are vertical lines.

    The first measure of a panel is drawn with the method's own marker, a second one with a small
    bar below it.

    Args:
        panels: by target.
        looks: by label.
        size: task and n, for the title.
        titles: of the targets.
    """
    most = max(len(panel.methods) for panel in panels.values())
    figure = canvas(max(8.8, 6.4 * len(panels) + 0.3), 1.9 + 0.27 * most)
    title_of(figure, "How far scores agree with what retraining shows", size)
    for target, axes in zip(panels, panels_of(figure, list(panels)), strict=True):
        _draw(axes, panels[target], looks)
        axes.set_title(titles.get(target, f"target {target}"), loc="left")
    first = list(dict.fromkeys(panel.measures[0] for panel in panels.values()))
    measures = list(dict.fromkeys(m for panel in panels.values() for m in panel.measures))
    marks = [(" or ".join(MEASURES[m] for m in first), "o", 6)]
    marks += [(MEASURES[m], "|", 9) for m in measures if m not in first]
    handles = [
        Line2D([], [], linestyle="none", marker=marker, color=BLACK, markersize=size, label=words)
        for words, marker, size in marks
    ]
    handles += [
        Line2D([], [], color=GREY, linestyle=_LINES[m], linewidth=1.2,
               label=f"ceiling, {MEASURES[m]}")
        for m in measures
        if any(m in panel.ceilings for panel in panels.values())
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    return figure


def _draw(axes: Axes, panel: FidelityPanel, looks: Mapping[str, Look]) -> None:
    first = panel.measures[0]

    def height(method: MethodFidelity) -> tuple[float, str]:
        mean = method.values[first].mean if first in method.values else math.nan
        return (-mean if math.isfinite(mean) else math.inf, method.label)

    methods = sorted(panel.methods, key=height)
    seeds = max(m.n_seeds for m in methods)
    for y, method in enumerate(methods):
        look = looks[method.label]
        for i, measure in enumerate(panel.measures):
            value = method.values.get(measure)
            if value is None:
                continue
            if not math.isfinite(value.mean):
                if i == 0:
                    axes.text(0.01, y, "undefined: says the same of all examples", va="center",
                              fontsize=8, color=GREY)  # fmt: skip
                continue
            axes.errorbar(
                value.mean,
                y + (0.0 if i == 0 else 0.22),
                xerr=np.array(reach(value))[:, None],
                color=look.colour,
                marker=look.marker if i == 0 else "|",
                markerfacecolor=look.face,
                markersize=6 if i == 0 else 7,
                elinewidth=1.1,
                capsize=0,
                linestyle="none",
                zorder=3,
            )
    for measure, ceiling in panel.ceilings.items():
        axes.axvline(ceiling, color=GREY, linestyle=_LINES[measure], linewidth=1.2, zorder=1)
    axes.set_yticks(range(len(methods)), [named(m.label, m.n_seeds, seeds) for m in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    values = [
        v.mean - reach(v)[0] for m in methods for v in m.values.values() if math.isfinite(v.mean)
    ]
    axes.set_xlim(min(-0.03, *values) if values else 0.0, 1.01)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(in_full("metrics", first))


def draw(results: TableResults) -> Figure:
    """The figure of a table, from its records alone: they hold the share of the ceiling."""
    panels: dict[str, FidelityPanel] = {}
    for target in results.targets:
        methods: list[MethodFidelity] = []
        ceilings: dict[str, float] = {}
        for row in results.rows(target):
            values = {}
            for measure in MEASURES:
                value = interval_of(row, "metrics", measure)
                if value is None:
                    continue
                values[measure] = value
                share = interval_of(row, "metrics", f"{measure}_of_ceiling")
                # a method that scores a sample has a ceiling of its own
                if row.watched is None and share is not None and abs(share.mean) > 1e-6:
                    ceilings.setdefault(measure, value.mean / share.mean)
            if values:
                methods.append(MethodFidelity(row.label, len(row.seeds), values))
        if methods:
            panels[target] = FidelityPanel(methods, ceilings)
    if not panels:
        raise LeftOutError(
            "no record was compared with retraining; train a bank and freeze its ground truth "
            "(fine-bench bank, fine-bench truth), then run with force=true"
        )
    return fidelity_and_ceiling(
        panels,
        results.looks,
        size=f"{results.size}; mean and 95 % interval over seeds",
        titles=results.titles,
    )
