"""What acting on scores did to a model: one point a method, a treatment and a number touched."""

from __future__ import annotations

from dataclasses import dataclass

from fine_bench.metrics.intervals import Interval

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
    """

    method: str
    treatment: str
    touched: int
    share: float
    bad_touched: float
    accuracy: Interval
    gain: Interval
    n_seeds: int
