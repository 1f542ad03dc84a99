"""Would a further run suspect the row too? From the runs' own scores to a chance for each row.

Run r suspects the k_r rows with the highest scores; probabilities and their differences are taken
as log-odds, which changes no order. With τ_r the middle between its last suspect
and the next row, m_ir = score_ir − τ_r says by how much run r suspects row i, or does not. The mean
of m_i over the R runs, and their standard deviation, go to ``theory.repeats.repeat_probability``:
it moderates the deviations, of R − 1 degrees of freedom each, and returns

    repeats_i = P(m of a further run ≥ 0 | the R runs).

What was lifted over the threshold by chance is expected to fall back, so the chance of a row that
all runs suspect is no 1. ``repeatable`` are the rows that most runs suspect, without those of the
least chance, so that *at most a share of them would not be a suspect in another run*, in
expectation. That says nothing of right and wrong: for it see ``metrics.error_rate``.

One run has no spread, and its chances are NaN. Only where f-INE's μ ranks, one run has errors of
its own, and several have the interval of ``scoring.interval_over_runs``; it speaks of a run that
trains on the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import logit
from scipy.stats import norm

from fine_bench.runner.clean.inputs.items import Items
from fine_bench.runner.clean.scoring import (
    CONFIDENCE,
    LEAST,
    Score,
    mu_interval,
    n_suspects,
    score_of,
)
from fine_bench.runner.clean.training import Floats, Run
from fine_bench.theory.repeats import at_most, repeat_probability


class Margins(NamedTuple):
    """By how much a run suspects each row.

    Attributes:
        mean: ``(n,)``, over the runs; ≥ 0 for suspects.
        error: ``(n,)``, standard deviation of one run; infinite where unknown.
        observations: ``(n,)`` or one number: behind each error; None where errors are the runs'.
        averaged: ``(n,)`` or one number: runs behind each mean.
    """

    mean: Floats
    error: Floats
    observations: int | None
    averaged: NDArray[np.int64] | int


def chance_to_repeat(runs: Sequence[Run], y: NDArray[np.int64], score: Score) -> Floats:
    """``repeats`` of each row, ``(n,)`` in [0, 1]; NaN where the runs say nothing of it."""
    found = margins(runs, y, score)
    if not np.isfinite(found.error).any():
        return np.full(len(y), np.nan)
    return repeat_probability(
        found.mean, found.error, 0.0, "high", found.observations, found.averaged
    )


def repeatable(
    chance: Floats, runs_found: NDArray[np.int64], runs: int, level: float
) -> NDArray[np.bool_]:
    """The rows that most runs suspect and of which at most ``level`` would not repeat, ``(n,)``.

    Args:
        chance: of ``chance_to_repeat``.
        runs_found: ``(n,)`` in how many of the ``runs`` a row was among the suspects.
        runs: how many there were.
        level: in (0, 1).
    """
    return at_most(chance, np.asarray(2 * runs_found > runs, dtype=np.bool_), level)


def with_repeats(
    table: pd.DataFrame, items: Items, runs: Sequence[Run], score: Score, level: float
) -> pd.DataFrame:
    """A ranking with the columns ``repeats`` and ``repeatable`` behind ``runs``.

    Args:
        table: of ``scoring.ranking``.
        items, runs, score: that it was made from.
        level: share of the repeatable that may not repeat, in (0, 1).
    """
    at = np.searchsorted(items.rows, table["row"].to_numpy())
    chance = chance_to_repeat(runs, items.y, score)[at]
    kept = repeatable(chance, table["runs_found"].to_numpy(), len(runs), level)
    place = list(table.columns).index("runs") + 1
    out = table.copy()
    out.insert(place, "repeats", chance)
    out.insert(place + 1, "repeatable", kept)
    return out


def margins(runs: Sequence[Run], y: NDArray[np.int64], score: Score) -> Margins:
    """Scores relative to their run's threshold, over the runs."""
    each = np.stack([_margin(run, y, score) for run in runs])
    if score == "mu":
        mean, low, high = mu_interval(runs)
        known = np.stack([~np.isnan(run.mu) for run in runs])
        count = known.sum(axis=0)
        # m = μ − τ, so its error is that of μ; the interval is of the mean over the runs
        error = (high - low) / (2 * norm.ppf(0.5 + CONFIDENCE / 2)) * np.sqrt(count)
        threshold = (np.stack([run.mu for run in runs]) - each)[known].mean()
        unknown = np.isnan(error)
        return Margins(
            np.where(np.isnan(mean), 0.0, mean - threshold),
            np.where(unknown, np.inf, error),
            None,
            np.maximum(count, 1),
        )
    mean = each.mean(axis=0)
    if len(runs) == 1:
        return Margins(mean, np.full(len(y), np.inf), None, 1)
    return Margins(mean, each.std(axis=0, ddof=1), len(runs), len(runs))


def _unbounded(values: Floats, score: Score) -> Floats:
    """Scores on a scale without ends, in the same order: near an end errors are not normal."""
    if score == "p_label":
        return np.asarray(logit(values.clip(LEAST, 1 - LEAST)))
    if score == "margin":
        return np.asarray(logit(((1 + values) / 2).clip(LEAST, 1 - LEAST)))
    return values


def _margin(run: Run, y: NDArray[np.int64], score: Score) -> Floats:
    """Of one run, ``(n,)``; see the module."""
    values = _unbounded(score_of(run, y, score), score)
    k = n_suspects(run.probabilities, y)
    order = np.sort(values)[::-1]
    if k == 0:
        return np.asarray(values - np.nextafter(order[0], np.inf))
    if k == len(order):
        return np.asarray(values - order[-1])
    return np.asarray(values - (order[k - 1] + order[k]) / 2)


__all__ = ["Margins", "chance_to_repeat", "margins", "repeatable", "with_repeats"]
