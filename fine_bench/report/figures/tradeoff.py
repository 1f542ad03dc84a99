"""Trade-off curves of traced subsets: what a reader of one statistic could tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fine_bench.report.figures.benchmark import title_of
from fine_bench.report.figures.samples import chosen, run_samples
from fine_bench.report.figures.style import BLACK, BLUE, GREEN, ORANGE, VERMILLION, canvas, styled
from fine_bench.report.figures.tables import TableResults
from fine_bench.report.figures.theory import Trace, unit_square
from fine_bench.theory.estimation import moment_mu
from fine_bench.theory.families import GaussianTradeOff
from fine_bench.theory.piecewise_linear import from_samples

_ALPHA = np.linspace(0.0, 1.0, 401)
_STYLES = ((VERMILLION, "-", "o"), (BLUE, "--", "s"), (GREEN, "-.", "^"), (ORANGE, ":", "D"))


@styled
def tradeoff_curves(traces: Sequence[Trace], size: str) -> Figure:
    """Empirical T(P, Q) of each subset, one panel each, with the G_μ of its moments, dashed.

    P is the statistic of batches that hold the subset, Q of batches that do not; samples of all
    steps are pooled. Lower curves mean more influence; the diagonal means none.

    Args:
        traces: P and Q samples, a panel each.
        size: task, seed and n, for the title.
    """
    figure = canvas(3.7 * len(traces) + 0.3, 4.3)
    title_of(figure, "What one statistic can tell of a subset: trade-off curves of one step", size)
    grid = figure.subplots(1, len(traces), squeeze=False)[0]
    for axes, trace, (colour, line, marker) in zip(
        grid, traces, (_STYLES[i % len(_STYLES)] for i in range(len(traces))), strict=True
    ):
        unit_square(axes)
        estimate = moment_mu(trace.p, trace.q)
        mu = float(np.asarray(estimate.mu))
        # a curve is that of |μ|: which of P and Q is larger does not matter to it
        p, q = (trace.p, trace.q) if mu >= 0 else (-trace.p, -trace.q)
        axes.plot(
            _ALPHA,
            from_samples(p, q)(_ALPHA),
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=4.5,
            markevery=(10, 60),
            label="from the samples",
        )
        axes.plot(
            _ALPHA,
            GaussianTradeOff(abs(mu))(_ALPHA),
            color=BLACK,
            linewidth=1.0,
            linestyle=(0, (4, 3)),
            label=f"Gaussian, |μ| = {abs(mu):.2f}",
        )
        axes.set_title(trace.name.replace(": ", ":\n", 1), loc="left", fontsize=8.5)
        axes.legend(loc="upper right")
    return figure


def draw(results: TableResults) -> Figure:
    """The figure of a table: the subsets that ``figure5_p_and_q`` shows."""
    found = run_samples(results)
    traces = [Trace(name, found.step, found.p[i], found.q[i]) for i, name in chosen(found)]
    return tradeoff_curves(
        traces,
        f"{results.table.task}: {found.row.label}, target {found.row.target}, seed {found.seed}; "
        f"{len(found.step):,} samples of each",
    )
