"""Influence by its definition: trained on all data, against all data without S, seeds only.

The bank's μ comes from random subsets: what else was in the subset is part of its noise, and its
models see only a share of the data. The definition has neither. A sample of sets S is therefore
measured by the definition too, and the two are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fine_bench.metrics._arrays import Vector, as_array, as_vector
from fine_bench.metrics.reliability import ceiling_of, spearman_rows
from fine_bench.seeds import derive
from fine_bench.theory.estimation import estimate_mu

LEAST_SEEDS = 5
LEAST_SETS = 5


@dataclass(frozen=True, eq=False)
class DefinitionMu:
    """μ of each set by the definition: ``mu``, ``std_error``, ``lower``, ``upper``, ``(n_sets,)``.

    All sets are tested against the same models on all data, so their errors are correlated.
    """

    mu: Vector
    std_error: Vector
    lower: Vector
    upper: Vector
    level: float


def definition_mu(
    margin: NDArray[Any],
    subset: NDArray[np.int64],
    sets: Sequence[NDArray[np.int64]],
    level: float = 0.95,
) -> DefinitionMu:
    """μ of S from the statistic "mean margin over the members of S".

    The "moment" estimate of ``fine_bench.theory.estimation``: P are the models of subset 0, trained
    on all data, Q those of subset s + 1, trained on all data without ``sets[s]``.

    Args:
        margin: ``(K, n)``, margins of all examples under each model.
        subset: ``(K,)``, 0 for all data, s + 1 for all data without ``sets[s]``.
        sets: positions of each set's members.
        level: of the intervals, in (0, 1).

    Raises:
        ValueError: wrong shapes, an empty set, or fewer than ``LEAST_SEEDS`` models of a kind.
    """
    x = as_array(margin, "margin")
    which = np.asarray(subset)
    if x.ndim != 2 or which.shape != (len(x),):
        raise ValueError(
            f"margin must have shape (K, n) and subset (K,), got {x.shape} and {which.shape}"
        )
    if not sets:
        raise ValueError("sets is empty; pass the positions of at least one set")
    counts = np.array([np.count_nonzero(which == s) for s in range(len(sets) + 1)])
    if counts.min() < LEAST_SEEDS:
        worst = int(counts.argmin())
        kind = "on all data" if worst == 0 else f"without set {worst - 1}"
        raise ValueError(
            f"the definition needs at least {LEAST_SEEDS} seeds of each kind, there are "
            f"{counts[worst]} models {kind}; retrain {LEAST_SEEDS - counts[worst]} more"
        )
    found = []
    for number, positions in enumerate(sets):
        if not len(positions):
            raise ValueError(f"set {number} is empty; a set needs at least one example")
        statistic = x[:, positions].mean(axis=1)
        p, q = statistic[which == 0], statistic[which == number + 1]
        one = estimate_mu(p, q, "moment", level)
        found.append([one.mu, one.std_error, one.lower, one.upper])
    mu, std_error, lower, upper = np.array(found, dtype=np.float64).T
    return DefinitionMu(mu, std_error, lower, upper, level)


def mean_over_sets(mu: NDArray[Any], sets: Sequence[NDArray[np.int64]]) -> Vector:
    """The bank's μ of each set: the mean of its members' own, ``(n_sets,)``.

    For a single example it is its μ. For a larger set it is an ordering, not an estimate: members
    that support each other have more influence together than each alone.
    """
    values = as_vector(mu, "mu")
    return np.array([values[positions].mean() for positions in sets], dtype=np.float64)


def relation(
    bank: NDArray[Any],
    definition: NDArray[Any],
    *,
    bank_error: NDArray[Any] | None = None,
    definition_error: NDArray[Any] | None = None,
    level: float = 0.95,
    n_resamples: int = 4000,
    seed: int = 0,
) -> dict[str, float]:
    """How μ by definition (y) relates to the bank's μ (x), over the sets.

    ``n``; ``spearman``; ``slope_through_origin`` Σxy/Σx²; ``slope`` and ``intercept`` of least
    squares; each with ``…/lower`` and ``…/upper``, the percentile bootstrap over sets. Noise of x
    flattens both slopes. With both standard errors also ``ceiling``, the correlation that equal
    true values would show through the noise: sqrt(r_x r_y), r = 1 − mean SE² / variance.

    Args:
        bank, definition: ``(n_sets,)``, finite.
        bank_error, definition_error: ``(n_sets,)`` standard errors.
        level: of the intervals, in (0, 1).
        n_resamples: of the bootstrap, ≥ 100.
        seed: of the bootstrap.

    Raises:
        ValueError: different lengths, fewer than ``LEAST_SETS`` sets, values that are not finite.
    """
    x, y = as_vector(bank, "bank"), as_vector(definition, "definition")
    if x.shape != y.shape:
        raise ValueError(f"bank has {len(x)} sets, definition {len(y)}; they must be the same")
    if len(x) < LEAST_SETS:
        raise ValueError(f"a relation needs at least {LEAST_SETS} sets, got {len(x)}")
    if n_resamples < 100 or not 0.0 < level < 1.0:
        raise ValueError(
            f"n_resamples must be at least 100 and level in (0, 1), got {n_resamples} and {level}"
        )
    rng = np.random.default_rng(derive(seed, "metrics/definition"))
    draws = rng.integers(0, len(x), size=(n_resamples, len(x)))
    result = {"n": float(len(x))}
    whole, resampled = _relations(x[None], y[None]), _relations(x[draws], y[draws])
    tail = 0.5 * (1.0 - level)
    for name, value in whole.items():
        result[name] = float(value[0])
        # a resample of one set over and over has no slope
        known = resampled[name][np.isfinite(resampled[name])]
        ends = np.quantile(known, [tail, 1.0 - tail]) if len(known) else (np.nan, np.nan)
        result[f"{name}/lower"], result[f"{name}/upper"] = map(float, ends)
    if bank_error is not None and definition_error is not None:
        shares = [
            1.0 - float(np.mean(as_vector(error, "std_error") ** 2)) / float(value.var(ddof=1))
            for value, error in ((x, bank_error), (y, definition_error))
        ]
        result["ceiling"] = ceiling_of(shares[0] * shares[1]) if min(shares) > 0 else float("nan")
    return result


def _relations(x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[str, Vector]:
    """The four numbers for each row of ``x``, ``y (r, n_sets)``."""
    dx, dy = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (dx * dy).sum(axis=1) / (dx**2).sum(axis=1)
        return {
            "spearman": spearman_rows(x, y),
            "slope_through_origin": (x * y).sum(axis=1) / (x**2).sum(axis=1),
            "slope": slope,
            "intercept": y.mean(axis=1) - slope * x.mean(axis=1),
        }
