"""The paper's estimator against the all-example one, on the examples that both scored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from fine_bench.metrics.agreement import N_STRATA
from fine_bench.report.figures.benchmark import Array, panels_of, title_of
from fine_bench.report.figures.style import BLACK, BLUE, GREY, VERMILLION, canvas, styled
from fine_bench.report.figures.titles import TARGET_TITLES

CLEAN = ("clean", BLUE, "o")
BAD = ("bad", VERMILLION, "^")
UNKNOWN = ("example, truth unknown", GREY, "o")


@dataclass(frozen=True)
class ScorePair:
    """Signed μ of two estimators on the same examples of one run.

    Attributes:
        x: of the all-example estimator, ``(n_watched,)``.
        y: of the paper's, ``(n_watched,)``.
        bad: which of them are bad, ``(n_watched,)``, or None where nobody knows.
        numbers: what ``metrics.agreement.agreement`` says of the two.
    """

    x: Array
    y: Array
    bad: NDArray[np.bool_] | None
    numbers: Mapping[str, float]

    @property
    def cuts(self) -> tuple[float, ...]:
        """The |x| between neighbouring strata, half-way from one stratum's last to the next."""
        sizes = [int(self.numbers[f"tercile_{t}/n"]) for t in range(1, N_STRATA + 1)]
        reach = np.sort(np.abs(self.x))
        ends = [int(end) for end in np.cumsum(sizes)[:-1] if 0 < end < len(reach)]
        return tuple(float(reach[end - 1] + reach[end]) / 2 for end in ends)


@styled
def agreement(
    panels: Mapping[str, ScorePair],
    *,
    x_label: str,
    y_label: str,
    size: str,
    titles: Mapping[str, str] = TARGET_TITLES,
) -> Figure:
    """Scatter of two estimators of μ, one panel a target.

    The two measure different tests (a whole run, one step), so the diagonal means nothing: the
    rank correlation is the agreement, the slope a change of scale. The thin vertical lines
    separate the thirds of the examples with small, middle and large |x|; where x has both signs,
    each of them is there twice.

    Args:
        panels: the compared scores by target.
        x_label, y_label: names of the all-example and of the paper's estimator.
        size: task, seed and what is compared, for the title.
        titles: of the targets.
    """
    figure = canvas(4.9 * len(panels) + 0.3, 4.9)
    title_of(figure, "The paper's estimator and the all-example one", size)
    for target, axes in zip(panels, panels_of(figure, list(panels)), strict=True):
        both = panels[target]
        _scatter(axes, both)
        numbers = both.numbers
        axes.set_title(
            f"{titles.get(target, f'target {target}')}\n"
            f"Spearman {_rank(numbers['spearman'])}, slope {_number(numbers['slope'])} "
            f"(through the origin {_number(numbers['slope_through_origin'])}), "
            f"n = {len(both.x):,}\n{_strata(both)}",
            loc="left",
            fontsize=8.5,
        )
        axes.set_xlabel(f"μ of the run, {x_label}")
        axes.set_ylabel(f"μ of one step, {y_label}")
    known = [c.bad is not None for c in panels.values()]
    kinds = ([CLEAN, BAD] if any(known) else []) + ([] if all(known) else [UNKNOWN])
    handles = [
        Line2D([], [], linestyle="none", marker=marker, markersize=5, color=colour, label=label)
        for label, colour, marker in kinds
    ]
    handles.append(Line2D([], [], color=BLACK, linewidth=1.1, label="least squares of y on x"))
    cut = Line2D([], [], color=GREY, linewidth=0.8, linestyle=":", label="between thirds of |x|")
    figure.legend(handles=[*handles, cut], loc="outside lower left", ncols=len(handles) + 1)
    return figure


def _scatter(axes: Axes, both: ScorePair) -> None:
    if both.bad is None:
        groups = [(UNKNOWN, np.ones(len(both.x), dtype=np.bool_))]
    else:
        groups = [(CLEAN, ~both.bad), (BAD, both.bad)]
    for (name, colour, marker), rows in groups:
        axes.plot(
            both.x[rows],
            both.y[rows],
            linestyle="none",
            marker=marker,
            markersize=4.0,
            markeredgewidth=0.0,
            color=colour,
            alpha=0.6,
            label=name,
        )
    low, high = float(both.x.min()), float(both.x.max())
    for cut in both.cuts:
        for place in sorted({-cut, cut}):
            if low <= place <= high:
                axes.axvline(place, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
    if math.isfinite(both.numbers["slope"]):
        ends = np.array([low, high])
        line = both.numbers["intercept"] + both.numbers["slope"] * ends
        axes.plot(ends, line, color=BLACK, linewidth=1.1)


def _strata(both: ScorePair) -> str:
    """The Spearman correlation in each stratum of |x|, and where the strata meet."""
    if len(both.cuts) != N_STRATA - 1:
        return "too few examples for thirds of |x|"
    ranks = [_rank(both.numbers[f"tercile_{t}/spearman"]) for t in range(1, N_STRATA + 1)]
    cuts = " and ".join(_number(cut) for cut in both.cuts)
    return f"Spearman in thirds: {', '.join(ranks)}; cut at |x| = {cuts}"


def _rank(value: float) -> str:
    """A correlation in two decimals; "undefined" where there is none."""
    return f"{value:z.2f}".replace("-", "−") if math.isfinite(value) else "undefined"


def _number(value: float) -> str:
    """A number in the unit of an axis: two decimals, or two digits below 0.1."""
    return _rank(value) if not abs(value) < 0.1 or value == 0 else f"{value:.2g}".replace("-", "−")
