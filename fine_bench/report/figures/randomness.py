"""Consistency by source: runs that differ in initialisation alone, in order alone, in both.

A source is switched off by fixing its seed for all run seeds (``trainer.init_seed``,
``trainer.order_seed``), which makes another setting of the same task. So the tables of one task
whose settings differ in these two seeds alone belong together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fine_bench.metrics.intervals import Interval
from fine_bench.report.figures.benchmark import panels_of, reach, title_of
from fine_bench.report.figures.requirements import interval_of
from fine_bench.report.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, canvas, span, styled
from fine_bench.report.figures.tables import TableResults
from fine_bench.report.figures.titles import TARGET_TITLES
from fine_bench.store.digest import digest

SOURCES: Mapping[str, tuple[str, str]] = {
    "initialisation": (BLUE, ""),
    "order": (ORANGE, "////"),
    "both": (GREEN, "...."),
}
"""What differs between the runs: colour and hatching of its bars."""


@dataclass(frozen=True)
class MethodLine:
    """A method's consistency by source."""

    label: str
    by_source: Mapping[str, Interval]
    n_seeds: Mapping[str, int]


@dataclass(frozen=True)
class Family:
    """Tables of one task that differ in what varies between their runs."""

    task: str
    tables: Mapping[str, TableResults]


def source_of(results: TableResults) -> str:
    """What varies between the runs of a table; "none" when both seeds are fixed."""
    for record in results.records.values():
        trainer = record.config.get("trainer", {})
        fixed = trainer.get("init_seed") is not None, trainer.get("order_seed") is not None
        return {
            (False, False): "both",
            (True, False): "order",
            (False, True): "initialisation",
        }.get(fixed, "none")
    return "both"


def families(table_results: Sequence[TableResults]) -> list[Family]:
    """The tables grouped by everything but the two seeds, in their order."""
    groups: dict[str, dict[str, TableResults]] = {}
    for results in table_results:
        source = source_of(results)
        if source == "none":
            continue
        record = next(iter(results.records.values()), None)
        config = {} if record is None else dict(record.config)
        trainer = dict(config.get("trainer", {}))
        for name in ("init_seed", "order_seed"):
            trainer.pop(name, None)
        alike = [results.table.task, results.table.data, config.get("task"), config.get("model")]
        # two tables of one source are different experiments after all: each its own family
        key = digest([*alike, trainer])
        while source in groups.get(key, {}):
            key += "+"
        groups.setdefault(key, {})[source] = results
    return [Family(next(iter(g.values())).table.task, g) for g in groups.values()]


@styled
def by_source(
    panels: Mapping[str, Sequence[MethodLine]],
    *,
    measure: str,
    size: str,
    titles: Mapping[str, str] = TARGET_TITLES,
) -> Figure:
    """Bars of consistency by what differs between the runs, one panel a target.

    Args:
        panels: methods by target.
        measure: what consistency is, for the axis.
        size: task and n, for the title.
        titles: of the targets.
    """
    most = max(len(lines) for lines in panels.values())
    figure = canvas(max(6.8, 5.1 * len(panels) + 0.3), 1.9 + 0.48 * most)
    title_of(figure, "Where runs disagree: initialisation, order of the data, or both", size)
    for target, axes in zip(panels, panels_of(figure, list(panels)), strict=True):
        lines = sorted(panels[target], key=lambda line: (-_best(line), line.label))
        for y, line in enumerate(lines):
            for i, (source, (colour, hatch)) in enumerate(SOURCES.items()):
                value = line.by_source.get(source)
                if value is None or not math.isfinite(value.mean):
                    continue
                axes.barh(
                    y + 0.26 * (i - 1),
                    value.mean,
                    height=0.25,
                    facecolor=colour if not hatch else "white",
                    edgecolor=colour,
                    hatch=hatch,
                    zorder=2,
                )
                if math.isfinite(value.lower):
                    axes.errorbar(
                        value.mean,
                        y + 0.26 * (i - 1),
                        xerr=np.array(reach(value))[:, None],
                        color=BLACK,
                        elinewidth=1.0,
                        capsize=2.0,
                        zorder=3,
                    )
        axes.set_yticks(range(len(lines)), [line.label.replace(" (", "\n(", 1) for line in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        ends = [v.mean for line in lines for v in line.by_source.values() if math.isfinite(v.mean)]
        axes.set_xlim(min([0.0, *ends]), 1.0)
        axes.grid(axis="y", visible=False)
        axes.set_title(titles.get(target, f"target {target}"), loc="left")
        seeds = span(n for line in lines for n in line.n_seeds.values())
        axes.set_xlabel(f"{measure}, mean over pairs of {seeds} seeds")
    figure.legend(
        handles=[
            Patch(facecolor=c if not h else "white", edgecolor=c, hatch=h, label=f"{name} differs")
            if name != "both"
            else Patch(facecolor="white", edgecolor=c, hatch=h, label="both differ")
            for name, (c, h) in SOURCES.items()
        ],
        loc="outside lower left",
        ncols=len(SOURCES),
        edgecolor=GREY,
    )
    return figure


def _best(line: MethodLine) -> float:
    values = [v.mean for v in line.by_source.values() if math.isfinite(v.mean)]
    return max(values, default=-math.inf)


def draw(family: Family, consistency: str, label: str) -> Figure:
    """The figure of a family of at least two sources.

    Args:
        family: its tables.
        consistency: the measure, a consistency metric of the leaderboard.
        label: the measure in words.
    """
    panels: dict[str, dict[tuple[str, str], dict[str, tuple[Interval, int, str]]]] = {}
    for source, results in family.tables.items():
        for row in results.rows():
            value = interval_of(row, "consistency", consistency)
            if value is not None:
                methods = panels.setdefault(row.target, {})
                found = methods.setdefault((row.estimator, row.estimator_hash), {})
                found[source] = (value, len(row.seeds), row.label)
    lines = {
        target: [
            MethodLine(
                next(iter(found.values()))[2],
                {source: value for source, (value, _, _) in found.items()},
                {source: n for source, (_, n, _) in found.items()},
            )
            for found in methods.values()
            if any(math.isfinite(value.mean) for value, _, _ in found.values())
        ]
        for target, methods in panels.items()
    }
    return by_source(
        {target: some for target, some in lines.items() if some},
        measure=label,
        size=f"{family.task}; 95 % intervals over seeds",
        titles=next(iter(family.tables.values())).titles,
    )
