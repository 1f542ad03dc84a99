"""How far numbers move over preset ranges of options: a bar, and the method's own value on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fine_bench.leaderboard.sensitivity import Spread, columns_of
from fine_bench.metrics.registry import Metric
from fine_bench.report.figures.benchmark import title_of
from fine_bench.report.figures.requirements import LeftOutError
from fine_bench.report.figures.style import GREY, Look, canvas, span, styled
from fine_bench.report.figures.tables import TableResults
from fine_bench.report.figures.titles import TARGET_TITLES

MEASURES = (
    "auroc",
    "average_precision",
    "fidelity",
    "lds",
    "consistency_spearman",
    "consistency_jaccard_corrected",
)
"""What gets a panel where there are numbers; every other number stands in the table."""

MOST = 4
_NOBODY = Look(GREY, "o", "-", True)


@styled
def bands(
    found: Mapping[str, Sequence[Spread]],
    columns: Sequence[Metric],
    looks: Mapping[str, Look],
    *,
    size: str,
    titles: Mapping[str, str] = TARGET_TITLES,
) -> Figure:
    """A row of panels a target, a panel a number, a bar a method.

    Args:
        found: the ranges by target.
        columns: what is drawn.
        looks: of the methods, by name.
        size: task and n, for the title.
        titles: of the targets.
    """
    heights = [0.75 + 0.34 * len(group) for group in found.values()]
    figure = canvas(max(6.8, 1.9 + 2.35 * len(columns)), 1.15 + sum(heights))
    title_of(figure, "How far numbers move over preset ranges of options", size)
    grid = figure.subplots(
        len(found), len(columns), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for row, (target, group) in zip(grid, found.items(), strict=True):
        ordered = sorted(group, key=lambda s: s.estimator)
        for number, (axes, column) in enumerate(zip(row, columns, strict=True)):
            assert isinstance(axes, Axes)
            _draw(axes, ordered, column, looks)
            if number:
                axes.set_yticklabels([])
        row[0].set_title(titles.get(target, f"target {target}"), loc="left")
    figure.legend(
        handles=[
            Line2D([], [], linestyle="none", marker="o", color=GREY, label="its own options"),
            Line2D([], [], color=GREY, linewidth=6, alpha=0.35, solid_capstyle="butt",
                   label="lowest to highest mean over its preset range"),
        ],
        loc="outside lower left",
        ncols=2,
    )  # fmt: skip
    return figure


def _draw(axes: Axes, spreads: Sequence[Spread], column: Metric, looks: Mapping[str, Look]) -> None:
    for y, spread in enumerate(spreads):
        look, band = looks.get(spread.estimator, _NOBODY), spread.bands.get(column.key)
        if band is None:
            axes.text(0.03, y, "no number", transform=axes.get_yaxis_transform(), va="center",
                      fontsize=8, color=GREY)  # fmt: skip
            continue
        axes.plot([band.lowest, band.highest], [y, y], color=look.colour, linewidth=6, alpha=0.35,
                  solid_capstyle="butt", zorder=2)  # fmt: skip
        # ends that are seen in grey, and where a bar is hardly wider than its marker
        axes.plot([band.lowest, band.highest], [y, y], color=look.colour, linestyle="none",
                  marker="|", markersize=9, markeredgewidth=1.2, zorder=3)  # fmt: skip
        if math.isfinite(band.own):
            axes.plot([band.own], [y], color=look.colour, linestyle="none", marker=look.marker,
                      markerfacecolor=look.face, markersize=6, zorder=4)  # fmt: skip
    axes.set_yticks(range(len(spreads)), [s.estimator for s in spreads])
    axes.set_ylim(len(spreads) - 0.45, -0.55)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", visible=False)
    label = "Jaccard@k, corrected" if column.label == "corrected" else column.label
    axes.set_xlabel(f"{label} ({column.better} is better)" if column.better else label)


def draw(results: TableResults) -> Figure:
    """The figure of a table's ranges."""
    if not results.spreads:
        raise LeftOutError(
            "no range of options was run; add for instance 'sensitivity=[fine,trak]' to the "
            "command that made these records"
        )
    shown = [s for s in results.spreads if s.bands]
    known = {column.key: column for column in columns_of(shown)}
    columns = [known[key] for key in MEASURES if key in known][:MOST]
    if not columns:
        raise LeftOutError("no configuration of a range has finished all of its seeds")
    by_target: dict[str, list[Spread]] = {}
    for spread in shown:
        by_target.setdefault(spread.target, []).append(spread)
    seeds = span(len(s.seeds) for s in shown)
    return bands(
        by_target,
        columns,
        {row.label: results.looks[row.label] for row in results.rows()} | _by_name(results),
        size=f"{results.table.task}: means over {seeds} seeds; bars are no intervals over seeds",
        titles=results.titles,
    )


def _by_name(results: TableResults) -> dict[str, Look]:
    """Looks by the bare name, for rows whose label says more."""
    return {row.estimator: results.looks[row.label] for row in reversed(results.rows())}
