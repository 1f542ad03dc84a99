"""Figures of the theory: trade-off functions, their composition, P and Q samples along a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fine_bench.report.figures.benchmark import title_of
from fine_bench.report.figures.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PALE,
    VERMILLION,
    canvas,
    styled,
)
from fine_bench.theory.central_limit import central_limit
from fine_bench.theory.composition import compose
from fine_bench.theory.estimation import moment_mu
from fine_bench.theory.families import GaussianTradeOff, LaplaceTradeOff
from fine_bench.theory.ordering import compare, equal_mean_example
from fine_bench.theory.piecewise_linear import from_pmf
from fine_bench.theory.subsampling import mix
from fine_bench.theory.tradeoff import TradeOff

Array = NDArray[np.float64]

_ALPHA = np.linspace(0.0, 1.0, 401)
_MAX_DOTS = 600
_SHADES = ("#9ecae1", "#4292c6", "#08519c", "#041e42")
STEPS = (1, 4, 16, 64)


def unit_square(axes: Axes) -> None:
    """Axes of a trade-off function, with the diagonal of no influence."""
    axes.plot([0, 1], [1, 0], color=PALE, linewidth=1.0, zorder=1)
    axes.text(0.62, 0.41, "no influence", color=GREY, fontsize=8, rotation=-45, ha="center",
              va="center", rotation_mode="anchor")  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    axes.set_xlabel("type-I error α")
    axes.set_ylabel("type-II error β")


# ---------------------------------------------------------------------------------- figure 3


def _normal(x: Array, mean: float, sd: float) -> Array:
    density = np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))
    return np.asarray(density, dtype=np.float64)


@styled
def equal_means(noise: float = 0.25) -> Figure:
    """The paper's Figure 3: equal mean influence, different trade-off functions.

    Args:
        noise: standard deviation of the accuracy over runs, percentage points, > 0. That of the
            paper's figure is not known to us.
    """
    example = equal_mean_example(noise)
    figure = canvas(10.4, 3.8)
    figure.suptitle(
        f"Averages mislead: both examples change the accuracy by {example.mean_change:g} points in "
        f"the mean, but not alike\nexact, no samples; accuracy over runs: standard deviation "
        f"{noise:g} points",
        x=0.01,
        ha="left",
    )
    one, two, curves = figure.subplots(1, 3)
    x = np.linspace(-4 * noise, 1 + 4 * noise, 801)
    without = _normal(x, 0.0, noise)
    cases = (
        (one, "d1: +0.1 points, in every run", _normal(x, 0.1, noise), VERMILLION, "--"),
        (
            two,
            "d2: +1 point, in one run of ten",
            0.9 * without + 0.1 * _normal(x, 1.0, noise),
            BLUE,
            "-",
        ),
    )
    for axes, title, density, colour, line in cases:
        axes.fill_between(x, without, color="#dddddd", linewidth=0, label="without it (Q)")
        axes.plot(x, density, color=colour, linestyle=line, label="with it (P)")
        axes.axvline(
            example.mean_change, color=BLACK, linewidth=0.9, linestyle=":", label="mean of P"
        )
        axes.set_title(title, loc="left")
        axes.set_xlabel("change of the accuracy (percentage points)")
        axes.set_ylabel("density over runs")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")
    one.sharey(two)
    unit_square(curves)
    curves.plot(
        _ALPHA, example.always(_ALPHA), color=VERMILLION, linestyle="--", label="d1: always"
    )
    curves.plot(_ALPHA, example.sometimes(_ALPHA), color=BLUE, label="d2: sometimes")
    crossings = compare(example.always, example.sometimes).crossings
    _mark(curves, crossings, example.always)
    curves.set_title("Trade-off functions (lower: more influence)", loc="left")
    curves.legend(loc="upper right")
    return figure


def _mark(axes: Axes, crossings: Sequence[float], f: TradeOff) -> None:
    if crossings:
        levels = np.asarray(crossings)
        axes.plot(levels, f(levels), "o", markersize=7, markerfacecolor="none",
                  markeredgecolor=BLACK, linestyle="none", label="crossing")  # fmt: skip


# ---------------------------------------------------------------------------------- figure 4


@dataclass(frozen=True)
class Composed:
    """``k`` steps of one kind, composed, and the G_μ of the central limit theorem."""

    k: int
    curve: TradeOff
    limit: GaussianTradeOff

    @property
    def gap(self) -> float:
        """Largest distance in β between the two."""
        return float(np.abs(self.curve(_ALPHA) - self.limit(_ALPHA)).max())


@dataclass(frozen=True)
class Subject:
    """One of two crossing influences: a single step, and what its repetitions compose to."""

    name: str
    step: TradeOff
    composed: tuple[Composed, ...]


@cache
def analytic_pair() -> tuple[Subject, Subject]:
    """Two textbook influences that cross: Laplace noise, and a strong effect in 3 runs of 10.

    The k-step versions are weakened with sqrt(k), as the theorem wants, so that their limit stays
    the same G_μ: Laplace(1/sqrt k) has μ = 1, 0.3 · shift 3/sqrt k has μ = 0.9.
    """

    def laplace(k: int) -> TradeOff:
        return LaplaceTradeOff(1.0 / float(np.sqrt(k)))

    def rare(k: int) -> TradeOff:
        return mix(GaussianTradeOff(3.0 / float(np.sqrt(k))), 0.3)

    def subject(name: str, weak: dict[int, TradeOff], mu: float) -> Subject:
        limit = GaussianTradeOff(mu)
        composed = (Composed(k, compose(f, k).trade_off, limit) for k, f in weak.items())
        return Subject(name, weak[1], tuple(composed))

    return (
        subject("weak, in every run", {k: laplace(k) for k in STEPS}, 1.0),
        subject("strong, in 3 runs of 10", {k: rare(k) for k in STEPS}, 0.9),
    )


def smoothed(p: Array, q: Array, bins: int = 12) -> TradeOff:
    """T(P, Q) of samples in ``bins`` pooled quantile bins, half a count added to every bin.

    Raw samples always hold an event that proves one side (the lowest value, say), and such curves
    have no Gaussian limit; half a count removes the proof. Symmetrised, as the theorem wants.

    Args:
        p, q: ``(n_samples,)``.
        bins: number of bins, at least 2.
    """
    edges = np.unique(np.quantile(np.concatenate([p, q]), np.linspace(0, 1, bins + 1)[1:-1]))
    counts = [
        np.bincount(np.searchsorted(edges, x), minlength=len(edges) + 1) + 0.5 for x in (p, q)
    ]
    return from_pmf(counts[0] / counts[0].sum(), counts[1] / counts[1].sum()).symmetrize()


def measured(name: str, p: Array, q: Array) -> Subject:
    """A traced subset as a subject: its per-step trade-off function repeated k times."""
    step = smoothed(p, q)
    composed = []
    for k in STEPS:
        limit = GaussianTradeOff(central_limit(step, k).mu)
        composed.append(Composed(k, compose(step, k).trade_off, limit))
    return Subject(name, step, tuple(composed))


def crossing_pair(p: Array, q: Array) -> tuple[int, int] | None:
    """The two traced subsets whose curves cross most, or None when none do.

    How much two curves cross is the smaller of the largest distances by which one is above the
    other; up to 1/sqrt(n_samples), two standard errors of an error rate near one half, is noise.

    Args:
        p, q: ``(n_traced, n_samples)``.
    """
    alpha = np.linspace(0, 1, 101)
    curves = np.stack([smoothed(a, b)(alpha) for a, b in zip(p, q, strict=True)])
    best, found = 1.0 / float(np.sqrt(p.shape[1])), None
    for i in range(len(curves)):
        gap = curves[i] - curves[i + 1 :]
        if gap.size:
            cross = np.minimum(gap.max(axis=1), -gap.min(axis=1))
            j = int(cross.argmax())
            if cross[j] > best:
                best, found = float(cross[j]), (i, i + 1 + j)
    return found


@styled
def crossing(pair: tuple[Subject, Subject], source: str) -> Figure:
    """The paper's Figure 4: curves may cross, so they do not rank; their compositions can.

    Left: the two steps. Then each composed k times (exactly, by privacy-loss convolution) with the
    Gaussian that the central limit theorem predicts, dashed, and the largest distance between.

    Args:
        pair: the two subjects.
        source: where the curves come from, with n, for the title.
    """
    figure = canvas(10.6, 4.2)
    title_of(
        figure,
        "Trade-off functions that cross, and the Gaussians that many steps make of them",
        source,
    )
    first, *rest = figure.subplots(1, 3)
    unit_square(first)
    for subject, colour, line in zip(pair, (VERMILLION, BLUE), ("--", "-"), strict=True):
        first.plot(_ALPHA, subject.step(_ALPHA), color=colour, linestyle=line, label=subject.name)
    _mark(first, compare(pair[0].step, pair[1].step, 1e-6).crossings, pair[0].step)
    first.set_title("One step: neither is below the other", loc="left")
    first.legend(loc="upper right", handlelength=1.8, labelspacing=0.3)
    for axes, subject in zip(rest, pair, strict=True):
        unit_square(axes)
        one_limit = len({c.limit.mu for c in subject.composed}) == 1
        for number, (step, shade) in enumerate(zip(subject.composed, _SHADES, strict=False)):
            axes.plot(
                _ALPHA,
                step.curve(_ALPHA),
                color=shade,
                marker="osD^"[number % 4],
                markersize=4.5,
                markevery=(20 + 12 * number, 90),
                label=f"k = {step.k}, off by {step.gap:.3f}"
                if one_limit
                else f"k = {step.k}: μ = {step.limit.mu:.2f}, off by {step.gap:.3f}",
            )
            if not one_limit or number == len(subject.composed) - 1:
                label = f"limit μ = {step.limit.mu:.2f}" if one_limit else None
                axes.plot(_ALPHA, step.limit(_ALPHA), color=ORANGE, linestyle="--", label=label)
        if not one_limit:
            axes.plot([], [], color=ORANGE, linestyle="--", label="G_μ, the limit for each k")
        axes.set_title(f"k steps: {subject.name}", loc="left")
        axes.legend(loc="upper right", handlelength=1.8, labelspacing=0.3)
    return figure


# ---------------------------------------------------------------------------------- figure 5


@dataclass(frozen=True)
class Trace:
    """P and Q samples of one subset along one run: ``step``, ``p``, ``q`` all (n_samples,)."""

    name: str
    step: Array
    p: Array
    q: Array


@styled
def p_and_q(traces: Sequence[Trace], size: str, statistic: str = "statistic x") -> Figure:
    """The paper's Figure 5: the statistic of batches with and without a subset, step by step.

    Left: samples (at most 600 of each shown) and their means over up to 30 stretches of the run.
    Right: the central 99 % of the samples, and the standardised mean difference μ of all of them
    with its 95 % interval.

    Args:
        traces: one row of panels each.
        size: task, seed and n, for the title.
        statistic: what the samples are, for the axis.
    """
    figure = canvas(9.6, 1.0 + 2.15 * len(traces))
    title_of(
        figure, "Batches that hold the subset (P) and batches that do not (Q), along one run", size
    )
    grid = figure.subplots(len(traces), 2, squeeze=False, width_ratios=[2.4, 1.0], sharey="row")
    for (along, beside), trace in zip(grid, traces, strict=True):
        thin = slice(None, None, max(1, int(np.ceil(len(trace.step) / _MAX_DOTS))))
        both = np.concatenate([trace.p, trace.q])
        low, high = np.quantile(both, [0.005, 0.995])
        pad = 0.08 * (high - low) or 1.0
        cells = int(np.clip(1.5 * np.sqrt(len(trace.p)), 10, 40))
        bins = np.linspace(low, high if high > low else low + 1.0, cells + 1)
        for name, samples, colour, marker, line in (
            ("Q: without", trace.q, VERMILLION, "x", "--"),
            ("P: with", trace.p, BLUE, "o", "-"),
        ):
            along.plot(
                trace.step[thin],
                samples[thin],
                linestyle="none",
                marker=marker,
                markersize=2.4,
                markeredgewidth=0.6,
                color=colour,
                alpha=0.35,
            )
            along.plot(
                _block_means(trace.step), _block_means(samples), color=colour, linestyle=line,
                linewidth=1.9, label=name,
            )  # fmt: skip
            beside.hist(
                samples[(samples >= low) & (samples <= high)],
                bins=bins.tolist(),
                orientation="horizontal",
                histtype="step",
                color=colour,
                linestyle=line,
                linewidth=1.4,
                density=True,
            )
        along.set_ylim(low - pad, high + pad)
        along.set_title(trace.name, loc="left")
        along.set_ylabel(statistic)
        along.legend(loc="upper right", ncols=2)
        found = moment_mu(trace.p, trace.q)
        mu, lower, upper = float(found.mu), float(found.lower), float(found.upper)
        text = f"μ per step {mu:.2f} [{lower:.2f}, {upper:.2f}]"
        beside.set_title(text.replace("-", "−"), loc="left")
        beside.grid(axis="x", visible=False)
        beside.set_xticks([])
    grid[-1][0].set_xlabel("update step")
    grid[-1][1].set_xlabel("density over the run (central 99 %)")
    return figure


def _block_means(values: Array) -> Array:
    """Means of up to 30 stretches, of ten values or more where there are enough."""
    parts = np.array_split(values, min(30, max(4, len(values) // 10), len(values)))
    return np.array([part.mean() for part in parts])
