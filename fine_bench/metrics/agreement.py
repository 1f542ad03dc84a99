"""Agreement of the paper's estimator with the all-example one, on the examples that both scored.

Both give a signed μ, but not of the same test. The paper's is that of *one step* whose batch holds
the example. The all-example estimator's is that of the *whole run*, in which the example stands in
one step an epoch: for effects that stay the same over E epochs of n examples in batches of m,
μ_run = μ_step·sqrt(E·m/n), and E epochs at equal weight (``composition="standardised"``) give
μ_step·sqrt(E). So the slope is a scale to be looked at, and the rank correlation is the agreement.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from fine_bench.metrics._arrays import Vector, as_vector
from fine_bench.types import InfluenceScores

N_STRATA = 3
MIN_EXAMPLES = 3
"""Fewest examples for which a correlation is computed."""


def agreement(paper: InfluenceScores, all_examples: InfluenceScores) -> dict[str, float]:
    """How the paper's scores y relate to the all-example scores x, on the paper's examples.

    ``n``; ``spearman``, ``pearson``; ``slope_through_origin`` Σxy/Σx²; ``slope`` and ``intercept``
    of least squares of y on x. Then the same three, ``n``, ``spearman`` and
    ``slope_through_origin``, for the thirds of the examples with small, middle and large |x|, as
    ``tercile_1/…`` to ``tercile_3/…`` (strata of x, of which nothing else is known to be smaller).

    Args:
        paper: scores of one row; its ``watched`` examples are compared.
        all_examples: scores of one row and the same target, of all examples.

    Returns:
        numbers by name; NaN where one of the two is constant or fewer than three examples are left.

    Raises:
        ValueError: different targets or training sets, several rows, nothing watched.
    """
    if paper.target != all_examples.target:
        raise ValueError(
            f"targets differ ({paper.target!r}, {all_examples.target!r}); compare scores of one"
        )
    if paper.values.shape != all_examples.values.shape or len(paper.values) != 1:
        raise ValueError(
            "agreement compares one row of scores of one training set, got shapes "
            f"{tuple(paper.values.shape)} and {tuple(all_examples.values.shape)}"
        )
    if all_examples.watched is not None:
        raise ValueError("all_examples has scores of some examples only; pass all-example scores")
    if not paper.watched_values.numel():
        raise ValueError("no single example is watched; give the paper's estimator a sample")
    others = all_examples.values if paper.watched is None else all_examples.values[:, paper.watched]
    x = as_vector(others[0], "all_examples")
    y = as_vector(paper.watched_values[0], "paper")
    result = _relation(x, y)
    order = np.argsort(np.abs(x), kind="stable")
    for number, rows in enumerate(np.array_split(order, N_STRATA), 1):
        stratum = _relation(x[rows], y[rows])
        for name in ("n", "spearman", "slope_through_origin"):
            result[f"tercile_{number}/{name}"] = stratum[name]
    return result


def _relation(x: Vector, y: Vector) -> dict[str, float]:
    result = dict.fromkeys(
        ("spearman", "pearson", "slope_through_origin", "slope", "intercept"), float("nan")
    )
    result["n"] = float(len(x))
    if len(x) >= 1 and float(x @ x) > 0:
        result["slope_through_origin"] = float(x @ y) / float(x @ x)
    if len(x) < MIN_EXAMPLES or np.ptp(x) == 0 or np.ptp(y) == 0:
        return result
    line = stats.linregress(x, y)
    return result | {
        "spearman": float(stats.spearmanr(x, y).statistic),
        "pearson": float(line.rvalue),
        "slope": float(line.slope),
        "intercept": float(line.intercept),
    }
