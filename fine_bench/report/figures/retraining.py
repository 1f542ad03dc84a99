"""Figures of a retraining bank: what models with an example do that models without it do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import ndtri

from fine_bench.metrics.gaussianity import CurveFit
from fine_bench.report.figures.benchmark import title_of
from fine_bench.report.figures.style import BLACK, BLUE, GREY, PALE, VERMILLION, canvas, styled

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Seen:
    """One training example in the bank: ``p`` and ``q`` are its margins in the models that were
    trained with it and without it, ``fit`` the error curve between them."""

    name: str
    p: Array
    q: Array
    fit: CurveFit


@styled
def retraining_curves(examples: Sequence[Seen], *, size: str) -> Figure:
    """Margins with and without chosen examples, and the error curves with their Gaussian fits.

    The curves have normal-deviate axes (``_curve``), on which none is empty.

    Args:
        examples: one column each, at least one.
        size: of what and how many models, for the title.
    """
    if not examples:
        raise ValueError("examples is empty; choose at least one training example")
    figure = canvas(2.45 * len(examples) + 0.5, 5.8)
    title_of(figure, "Trained with an example and without it: margins and error curves", size)
    grid = figure.subplots(2, len(examples), squeeze=False)
    for column, one in enumerate(examples):
        _margins(grid[0, column], one)
        _curve(grid[1, column], one)
        if column:
            grid[1, column].set_ylabel("")
    grid[0, 0].set_ylabel("models")
    grid[0, 0].legend(loc="upper left", handlelength=1.2)
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), handlelength=1.8)
    return figure


def _margins(axes: Axes, one: Seen) -> None:
    edges = np.histogram_bin_edges(np.concatenate([one.p, one.q]), bins=28)
    for values, colour, hatch, label in (
        (one.q, VERMILLION, "/////", f"without ({len(one.q)})"),
        (one.p, BLUE, None, f"with ({len(one.p)})"),
    ):
        axes.hist(
            values,
            bins=edges.tolist(),
            histtype="stepfilled",
            facecolor=(*_rgb(colour), 0.35) if hatch is None else "none",
            edgecolor=colour,
            hatch=hatch,
            label=label,
        )
    axes.set_title(f"{one.name}\nμ = {one.fit.mu:+.2f}".replace("-", "−"), loc="left")
    axes.set_xlabel("margin of its given label")
    axes.margins(y=0.35)


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


TICKS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
"""Errors that are marked along the axes of a curve."""


def _curve(axes: Axes, one: Seen) -> None:
    """The errors on normal-deviate axes: the curve of a Gaussian μ is a straight line there.

    Φ⁻¹(β) = −Φ⁻¹(α) − μ, so curves that would lie on the very edges of linear axes stay apart. An
    error of no model, or of all, has no deviate: it is drawn at half a model.
    """
    least_p, least_q = 0.5 / len(one.p), 0.5 / len(one.q)
    alpha = ndtri(np.clip(one.fit.alpha, least_p, 1 - least_p))
    beta = ndtri(np.clip(one.fit.beta, least_q, 1 - least_q))
    # far enough for half a model and for the middle of the fitted line
    reach = max(-float(ndtri(min(least_p, least_q))), abs(one.fit.mu) / 2) + 0.5
    ends = np.array([-reach, reach])
    axes.axvspan(-reach, float(ndtri(least_p)), color=PALE, alpha=0.3, linewidth=0)
    axes.axhspan(-reach, float(ndtri(least_q)), color=PALE, alpha=0.3, linewidth=0,
                 label="less than one model")  # fmt: skip
    axes.plot(ends, -ends, color=PALE, linewidth=1.0, label="no influence")
    axes.step(alpha, beta, where="post", color=BLACK, linewidth=1.3, label="models", zorder=3)
    axes.plot(ends, -ends - one.fit.mu, color=BLUE, linestyle="--", label="Gaussian fit")
    apart = bool(((one.fit.alpha == 0) & (one.fit.beta == 0)).any())
    words = "fit not rejected at 5 %" if one.fit.is_gaussian else "fit rejected at 5 %"
    axes.set_title(
        f"{words}\n{'no overlap of the two' if apart else ''}".rstrip(),
        loc="left",
        fontsize=8,
        color=GREY if one.fit.is_gaussian else BLACK,
    )
    # marks that would run into each other are left out
    shown = [t for t in (TICKS if reach < 4.5 else TICKS[::3]) if abs(ndtri(t)) < reach]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ndtri(shown).tolist(), [f"{t:g}" for t in shown])
    axes.tick_params(axis="x", labelrotation=60)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.set_xlabel("type-I error α")
    axes.set_ylabel("type-II error β")


@dataclass(frozen=True, eq=False)
class Pairs:
    """μ of sets by the bank (x) and by the definition (y) with its interval, ``(n_sets,)`` each."""

    x: Array
    y: Array
    lower: Array
    upper: Array
    bad: NDArray[np.bool_]


@styled
def definition_figure(pairs: Pairs, *, slope: float, text: str, size: str) -> Figure:
    """μ by definition against the bank's μ, single examples.

    Args:
        pairs: the examples.
        slope: of the line through the origin.
        text: what the relation is, in a corner.
        size: of what and how many, for the title.
    """
    figure = canvas(6.4, 5.0)
    title_of(figure, "μ by the definition against μ from random subsets", size)
    axes = figure.subplots()
    for chosen, colour, marker, face, label in (
        (~pairs.bad, BLUE, "o", "white", "clean"),
        (pairs.bad, VERMILLION, "^", VERMILLION, "known bad"),
    ):
        if not chosen.any():
            continue
        x, y = pairs.x[chosen], pairs.y[chosen]
        reach = np.stack([y - pairs.lower[chosen], pairs.upper[chosen] - y])
        axes.errorbar(
            x,
            y,
            yerr=reach,
            fmt=marker,
            color=colour,
            markerfacecolor=face,
            markersize=4.5,
            elinewidth=0.6,
            alpha=0.85,
            label=f"{label} ({len(x)})",
        )
    ends = np.array([min(0.0, float(pairs.x.min())), float(pairs.x.max())])
    axes.plot(ends, slope * ends, color=BLACK, label=f"slope {slope:.2f} through 0")
    axes.plot(ends, ends, color=GREY, linestyle=":", label="equal")
    axes.set_xlabel("μ from the bank's random subsets (margin)")
    axes.set_ylabel("μ by the definition, 95 % interval (margin)")
    axes.legend(loc="upper left", title=text, alignment="left")
    return figure
