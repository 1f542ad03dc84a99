"""Which of two trade-off functions means more influence, and an example in which means mislead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fine_bench.theory.families import GaussianTradeOff
from fine_bench.theory.piecewise_linear import PiecewiseLinear, from_pmf
from fine_bench.theory.subsampling import MixedTradeOff
from fine_bench.theory.tradeoff import TradeOff


@dataclass(frozen=True)
class Ordering:
    """How two trade-off functions f, g stand: lower means more influence."""

    relation: Literal["equal", "f_below", "g_below", "crossing"]
    crossings: tuple[float, ...]
    """Levels α at which f − g changes sign, rising."""
    max_above: float
    """Largest f − g, ≥ 0."""
    max_below: float
    """Largest g − f, ≥ 0."""


def compare(f: TradeOff, g: TradeOff, tolerance: float = 1e-9) -> Ordering:
    """Partial order of trade-off functions, with the levels at which they cross.

    Differences up to `tolerance` (in β) count as equal. The curves are compared at the vertices
    of piecewise-linear functions, at 2,001 even levels and at the ratio tests of both for losses
    from −40 to 40, which reach levels near 0 and 1 that an even grid would miss.
    """
    if not tolerance >= 0.0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance!r}")
    losses = np.linspace(-40.0, 40.0, 4001)
    levels = [np.linspace(0.0, 1.0, 2001)]
    for curve in (f, g):
        levels.append(curve.ratio_test(losses).alpha)
        if isinstance(curve, PiecewiseLinear):
            levels.append(curve.alpha)
    grid = np.unique(np.concatenate(levels))
    gap = f(grid) - g(grid)
    sign = np.where(gap > tolerance, 1, np.where(gap < -tolerance, -1, 0))
    decided = np.flatnonzero(sign)
    turns = np.flatnonzero(np.diff(sign[decided]))
    left, right = grid[decided[turns]], grid[decided[turns + 1]]
    start = sign[decided[turns]]
    for _ in range(60):
        middle = 0.5 * (left + right)
        same = (f(middle) - g(middle)) * start > 0.0
        left, right = np.where(same, middle, left), np.where(same, right, middle)
    relation: Literal["equal", "f_below", "g_below", "crossing"]
    if decided.size == 0:
        relation = "equal"
    elif turns.size:
        relation = "crossing"
    else:
        relation = "f_below" if sign[decided[0]] < 0 else "g_below"
    return Ordering(
        relation,
        tuple(float(x) for x in 0.5 * (left + right)),
        max(float(gap.max()), 0.0),
        max(float(-gap.min()), 0.0),
    )


@dataclass(frozen=True)
class EqualMeanExample:
    """Two examples of equal mean influence and different trade-off curves."""

    mean_change: float
    """Mean change of the accuracy by either example, in percentage points."""
    always: TradeOff
    """d1: changes the accuracy by 0.1 points in every run."""
    sometimes: TradeOff
    """d2: changes it by 1 point in one run out of ten, else not at all."""


def equal_mean_example(noise: float = 0.5) -> EqualMeanExample:
    """Averages mislead (Panda et al., figure 3): equal means, different influence.

    Without the example a run's accuracy is N(a, `noise`²), in percentage points; d1 adds 0.1
    always, d2 adds 1 with probability 0.1. Then T(P, Q) is G_{0.1/noise} for d1 and T of the
    mixture 0.9·N(0, 1) + 0.1·N(1/noise, 1) against N(0, 1) for d2. With `noise` = 0 d1 is told
    with certainty (f = 0) and d2 only when it acts (f = max(0, 1 − α/0.9)).
    The noise of the paper's figure is not known to us; 0.5 is our choice.
    """
    if not (np.isfinite(noise) and noise >= 0.0):
        raise ValueError(f"noise must be a standard deviation >= 0 in points, got {noise!r}")
    small, large, chance = 0.1, 1.0, 0.1
    if noise == 0.0:
        always: TradeOff = from_pmf([0.0, 1.0], [1.0, 0.0])
        sometimes: TradeOff = from_pmf([1.0 - chance, chance], [1.0, 0.0])
    else:
        always = GaussianTradeOff(small / noise)
        # H0 is the run with the example, hence the mixture stands first: the inverse of f_p.
        sometimes = MixedTradeOff(GaussianTradeOff(large / noise), chance).inverse()
    return EqualMeanExample(chance * large, always, sometimes)
