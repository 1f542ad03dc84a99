"""What acting on scores did to a model: one point a method, a treatment and a number touched.

Removing the most suspicious examples first and, from the other end, the least suspicious first
gives two curves of test accuracy against the share removed. With a(s) the accuracy after a share s
was removed, a(0) that of the untreated model and S the largest share,

    area = (1/S) ∫₀^S a(s) ds    (trapezoids),

the mean accuracy along a curve. A ranking is good where the first area is large and the second
small; their difference, the *gap*, is 0 for a random order. Data valuation reads these curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fine_bench.metrics.intervals import Interval, mean_interval
from fine_bench.metrics.registry import Metric

CURE = "cure: tuned again without the top of the list"
METRICS = (
    Metric("cure/steering_rate", "steering rate", "lower", table=CURE, rank=40),
    Metric("cure/oracle_steering_rate", "the oracle's", "lower", table=CURE, rank=41),
    Metric("cure/removed", "removed", "lower", unit="examples", table=CURE, rank=42),
    Metric("cure/bad_removed", "of them bad", "higher", unit="examples", table=CURE, rank=43),
    Metric("cure/test_loss", "clean test loss", "lower", unit="nats", table=CURE, rank=44),
    Metric("cure/oracle_test_loss", "the oracle's loss", "lower", unit="nats", table=CURE, rank=45),
    Metric("cure/seconds", "seconds of tuning again", "lower", unit="s", digits=None, table=""),
)
"""Computed by tuning a language model again without the top of its list."""

WORST_FIRST, BEST_FIRST = "remove", "remove_best"
"""The two treatments whose areas are compared."""

ORACLE, RANDOM = "oracle", "random order"
"""The two orders that stand beside those of the methods."""


@dataclass(frozen=True)
class CurePoint:
    """One method, treatment and number of examples touched.

    Attributes:
        method: of the order; ``"oracle"`` and ``"random order"`` besides the scored ones.
        treatment: what was done; ``"none"`` for the untreated models.
        touched: number of examples touched.
        share: of the training set.
        bad_touched: how many of them are bad, mean over seeds.
        accuracy: mean test accuracy over the retraining seeds with its interval.
        gain: accuracy minus that of the untreated model of the same seed, with its interval.
        n_seeds: number of retraining seeds.
        by_seed: the accuracies that ``accuracy`` is the mean of, by retraining seed.
    """

    method: str
    treatment: str
    touched: int
    share: float
    bad_touched: float
    accuracy: Interval
    gain: Interval
    n_seeds: int
    by_seed: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Removal:
    """What a method's order is worth when examples are removed along it.

    Attributes:
        method: of the order.
        worst_first, best_first: areas, mean over retraining seeds with its interval; None where
            the treatment was not tried.
        gap: the first minus the second, seed by seed; None without both.
    """

    method: str
    worst_first: Interval | None
    best_first: Interval | None
    gap: Interval | None


def removal_area(shares: Sequence[float], accuracies: Sequence[float]) -> float:
    """The mean height of a curve, by trapezoids.

    Args:
        shares: removed, ascending from 0; at least two.
        accuracies: at each of them.

    Raises:
        ValueError: other lengths, or shares that do not ascend from 0.
    """
    x, y = np.asarray(shares, dtype=np.float64), np.asarray(accuracies, dtype=np.float64)
    if len(x) < 2 or x.shape != y.shape or x[0] != 0 or (np.diff(x) <= 0).any():
        raise ValueError(
            f"shares must ascend from 0, with an accuracy each, got {list(shares)} and "
            f"{len(y)} accuracies; begin with the untreated model"
        )
    return float(np.trapezoid(y, x) / x[-1])


def removals(points: Sequence[CurePoint]) -> list[Removal]:
    """The areas of every method whose examples were removed, in the order of the points."""
    plain = next(p for p in points if p.treatment == "none")
    areas: dict[str, dict[str, dict[int, float]]] = {}
    for treatment in (WORST_FIRST, BEST_FIRST):
        for method in dict.fromkeys(p.method for p in points if p.treatment == treatment):
            curve = sorted(
                (p for p in points if (p.method, p.treatment) == (method, treatment)),
                key=lambda p: p.share,
            )
            shares = [0.0, *(p.share for p in curve)]
            areas.setdefault(method, {})[treatment] = {
                seed: removal_area(shares, [start, *(p.by_seed[seed] for p in curve)])
                for seed, start in plain.by_seed.items()
            }
    found = []
    for method, own in areas.items():
        worst, best = own.get(WORST_FIRST), own.get(BEST_FIRST)
        gap = {seed: x - best[seed] for seed, x in worst.items()} if worst and best else None
        means = [None if x is None else mean_interval(x) for x in (worst, best, gap)]
        found.append(Removal(method, *means))
    return found
