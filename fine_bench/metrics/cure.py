"""What acting on scores did to a model: one point a method, a treatment and a number touched."""

from __future__ import annotations

from dataclasses import dataclass

from fine_bench.metrics.intervals import Interval
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
