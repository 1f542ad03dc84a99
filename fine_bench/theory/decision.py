"""From μ with its interval to what an auditor could tell.

Whoever has one value of the statistic and is to say whether the data were in the run makes two
errors. With a normal shift of |μ|, the best test that says "not in" of a share α of the runs with
them misses a share

    β = G_|μ|(α) = Φ(Φ⁻¹(1 − α) − |μ|)

of the runs without; with both errors equal it is Φ(−|μ|/2); and the run is (ε, δ)-indistinguishable
with the smallest ε for which δ_|μ|(ε) ≤ δ. All three are monotone in |μ|, so an interval for μ
becomes an interval for each: its end nearer 0 tells *at least* as much, its farther end *at most*.
An interval that holds 0 shows nothing at least, and an open end nothing at most: such a bound is
unknown (None), never 0 or infinite.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from fine_bench.theory.arrays import check_probability
from fine_bench.theory.families import GaussianTradeOff


@dataclass(frozen=True)
class Told:
    """What a Gaussian influence of ``mu`` lets tell."""

    mu: float
    """|μ|, ≥ 0."""
    type_2: float
    """β of the best test at the asked type-I error."""
    equal_errors: float
    """Φ(−|μ|/2), both errors of the test that makes them equal."""
    epsilon: float
    """Smallest ε at the asked δ; inf where none reaches it."""


@dataclass(frozen=True)
class Decision:
    """What can be told about data, from one statistic of one run."""

    alpha: float
    """Type-I error that was asked."""
    delta: float
    """δ that was asked."""
    estimate: Told
    at_least: Told | None
    """From the end of the interval nearer 0; None where the interval holds 0."""
    at_most: Told | None
    """From the farther end; None where it is open."""


def told(mu: float, alpha: float = 0.05, delta: float = 1e-5) -> Told:
    """What a reader of a statistic with the Gaussian influence |`mu`| can tell.

    Args:
        mu: signed or not, finite.
        alpha: type-I error of the test, in [0, 1].
        delta: of (ε, δ), in [0, 1].
    """
    check_probability(alpha, "alpha")
    check_probability(delta, "delta")
    if not np.isfinite(mu):
        raise ValueError(f"mu must be finite, got {mu!r}; what is unknown tells nothing")
    f = GaussianTradeOff(abs(float(mu)))
    return Told(f.mu, float(f(alpha)), float(ndtr(-0.5 * f.mu)), f.epsilon(delta))


def nearer_end(lower: float, upper: float) -> float | None:
    """The end of an interval of μ nearer 0, signed; None where the interval holds 0."""
    if lower > 0.0:
        return lower
    return upper if upper < 0.0 else None


def farther_end(lower: float, upper: float) -> float | None:
    """The largest |μ| of an interval; None where an end is open."""
    found = max(abs(lower), abs(upper))
    return found if np.isfinite(found) else None


def decide(
    mu: float, lower: float, upper: float, alpha: float = 0.05, delta: float = 1e-5
) -> Decision:
    """What an auditor could tell, with what is sure at the level of the interval.

    Args:
        mu: estimate of μ, signed, finite.
        lower, upper: its interval; infinite where an end is open.
        alpha, delta: see ``told``.
    """
    if not lower <= upper:
        raise ValueError(
            f"an interval needs lower <= upper, got [{lower!r}, {upper!r}]; say 'unknown' with "
            "infinite ends"
        )
    near, far = nearer_end(lower, upper), farther_end(lower, upper)
    return Decision(
        alpha,
        delta,
        told(mu, alpha, delta),
        None if near is None else told(near, alpha, delta),
        None if far is None else told(far, alpha, delta),
    )
