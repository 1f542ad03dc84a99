"""The influence of a group from stored scores of its members: f-INE with an interval, and sums.

*f-INE.* For a target that asks queries the observable is the same for every example, so the test
of a subset S is that of its members together. With u_i = Σ_t w_t (c_i,t − c̄_t), the shift that
example i gives to the statistic X = Σ_t w_t x_t, up to 1/m, and V = Σ_t w_t² σ_t² over an epoch's
worth of steps,

    μ_S = Σ_{i ∈ S} u_i / sqrt(n V) = Σ_{i ∈ S} μ_i,

the noise of X being that of the batches, whoever is tested. Replacing S by average examples shifts
X by the sum of what its members do; that the members' gradients would be others in a run without S
is left out, as it is for a single example. Each stored μ_i has a V_i of its own, from the steps at
which i was in the batch. V_i is V up to sampling noise, which the errors hold.

*Interval.* The errors of μ_i within a run go together: copies of an image err alike, and a run's
initialisation moves a whole class, while those of examples drawn at random hardly do. Scores that
hold each epoch's part z_b,i in them (``FINECallback(group_errors=True)``) show how much, since
what members have in common they have in each epoch: with Z_b = Σ_{i ∈ S} z_b,i,

    se_S² = k/(k − 1) · Σ_b (Z_b − Z̄)²,    correlation = (se_S² − Σ se_i²) / ((Σ se_i)² − Σ se_i²)

On ten seeds of two tasks 95 % intervals of it covered the mean over the other runs in 94 to 98 % of
the cases, for groups of 8, 30 and 300, of random members, of one class, of flipped labels
(``results/group_coverage.md``). Without the parts only a bound is known. For *any* dependence the
standard deviation of a sum is at most the sum of the standard deviations,

    se_S = Σ_{i ∈ S} se_i

too long by up to sqrt(|S|) where errors are independent, right for copies. With several runs their
own spread (``between_runs``) needs neither.

For *self* this does not hold: there every example has an observable of its own, and what one member
does to another's is in no stored score.

*Any method.* ``standing`` tells how far a group's sum lies from those of random groups of its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit
from scipy.stats import rankdata
from torch import Tensor

from fine_bench.metrics._arrays import End
from fine_bench.metrics.intervals import Interval
from fine_bench.types import InfluenceScores


@dataclass(frozen=True)
class GroupInfluence:
    """μ of a group by one run.

    Attributes:
        mu: μ_S, dimensionless; positive where the group helps the target.
        std_error: its standard error, measured over epochs; or, where ``measured`` is False, a
            bound on it that holds whatever the members' errors have in common.
        lower, upper: interval of the asked level, μ_S ± z · ``std_error``.
        size: |S|.
        measured: whether the dependence between the members' errors was measured.
        correlation: mean correlation between the errors of two members, as ``std_error`` implies
            it; None where it is not measured, or with one member.
    """

    mu: float
    std_error: float
    lower: float
    upper: float
    size: int
    measured: bool = False
    correlation: float | None = None


@dataclass(frozen=True)
class Standing:
    """Where a group's summed score stands among random groups of its size.

    Attributes:
        total: Σ of the members' scores, in the unit of the scores.
        z: distance from the mean of random groups, in their standard deviations, positive towards
            the suspicious end; NaN where all scores are equal.
        median_member: share of the examples that are less suspicious than the median member.
        least_member: the same of the least suspicious member.
    """

    total: float
    z: float
    median_member: float
    least_member: float


def members_of(members: Tensor | Sequence[int], n: int) -> NDArray[np.int64]:
    """Positions of a group, checked.

    Raises:
        ValueError: none, repeated or unknown positions, or every example.
    """
    found = np.asarray(members)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise ValueError(
            "a group is a vector of positions of training examples, at least one, got "
            f"{found.dtype} of shape {found.shape}"
        )
    if found.min() < 0 or found.max() >= n:
        raise ValueError(
            f"a group names positions from {found.min()} to {found.max()}, but there are {n} "
            f"examples, counted 0 … {n - 1}"
        )
    if len(np.unique(found)) < len(found):
        raise ValueError("a group names a position more than once; name each once")
    if len(found) == n:
        raise ValueError("a group of all examples leaves nothing to compare it with")
    return found.astype(np.int64)


def refuse_overlaps(groups: Mapping[str, Tensor | Sequence[int]], n: int) -> None:
    """Refuse groups that share examples: they cannot be told apart by what they do.

    Raises:
        ValueError: two of them overlap, by name and number; or one is no group of n examples.
    """
    owner = np.full(n, -1)
    for number, (name, members) in enumerate(groups.items()):
        rows = members_of(members, n)
        taken = owner[rows][owner[rows] >= 0]
        if len(taken):
            other = list(groups)[int(taken[0])]
            common = int((taken == taken[0]).sum())
            raise ValueError(
                f"groups {other!r} and {name!r} overlap in {common} of {len(rows)} examples, so "
                "what these do would count for both; compare groups that have no example in common"
            )
        owner[rows] = number


def group_influence(
    scores: InfluenceScores, members: Tensor | Sequence[int], level: float = 0.95
) -> GroupInfluence:
    """f-INE's μ of a group from its members', with an interval.

    Args:
        scores: f-INE of all examples with standard errors, one row, of a target that asks queries.
        members: distinct positions of training examples.
        level: of the interval, in (0, 1).

    Raises:
        ValueError: the scores are of *self*, of several rows, of a sample of the examples, or
            without errors; a bad group or level.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}; try 0.95")
    if scores.target == "self":
        raise ValueError(
            "on self each example has an observable of its own, so the members' scores do not add "
            "up to the group's; use target=validation"
        )
    if len(scores.values) != 1 or scores.watched is not None:
        raise ValueError(
            "the group's μ is read from one row of all examples, got "
            f"{tuple(scores.values.shape)}" + (" of a sample" if scores.watched is not None else "")
        )
    if scores.std_error is None:
        raise ValueError(
            f"{scores.method} has no standard errors, so its sum has no interval; take the scores "
            "of fine, or use standing()"
        )
    rows = members_of(members, scores.values.shape[1])
    mu = float(scores.values[0, rows].double().sum())
    single = scores.std_error[0, rows].double()
    error, correlation = float(single.sum()), None
    parts = scores.extras.get("group_parts")
    measured = parts is not None and len(parts) > 1
    if parts is not None and measured:
        error = _jackknife(parts[:, 0, rows].double())
        squares = float(single.square().sum())
        crossed = float(single.sum()) ** 2 - squares
        if crossed > 0.0:
            correlation = (error**2 - squares) / crossed
    reach = float(ndtri((1.0 + level) / 2.0)) * error
    return GroupInfluence(mu, error, mu - reach, mu + reach, len(rows), measured, correlation)


def _jackknife(parts: Tensor) -> float:
    """se_S from the members' parts ``(k, |S|)``."""
    whole = parts.sum(1)
    k = len(whole)
    return float(((whole - whole.mean()).square().sum() * k / (k - 1)).sqrt())


def between_runs(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over runs with Student's interval, which takes runs to be independent and normal.

    Raises:
        ValueError: fewer than two runs.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over runs needs at least two of them, got {len(values)}")
    x = np.asarray(values, dtype=np.float64)
    reach = stdtrit(len(x) - 1, (1.0 + level) / 2.0) * x.std(ddof=1) / np.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean() - reach), float(x.mean() + reach))


def standing(
    values: Tensor | NDArray[np.float64], members: Tensor | Sequence[int], end: End
) -> Standing:
    """A group's summed score among random groups of its size.

    The sum over k of n examples drawn without replacement has mean k·s̄ and variance
    k (n − k)/(n − 1) · var(s), var with n in the denominator, so no group need be drawn.

    Args:
        values: ``(n,)`` scores of all examples.
        members: distinct positions.
        end: the suspicious end of the scores.

    Raises:
        ValueError: a bad group, scores of another shape, or not finite.
    """
    s = np.asarray(values, dtype=np.float64)
    if s.ndim != 1 or not np.isfinite(s).all():
        raise ValueError(f"scores must be finite and of shape (n,), got shape {s.shape}")
    rows = members_of(members, len(s))
    n, k = len(s), len(rows)
    total = float(s[rows].sum())
    spread = float(s.std()) * np.sqrt(k * (n - k) / (n - 1))
    # scores that differ by rounding only say nothing
    known = spread > 1e-12 * max(float(np.abs(s).max()), np.finfo(np.float64).tiny)
    sign = 1.0 if end == "high" else -1.0
    ranks = (rankdata(sign * s) - 1) / (n - 1)
    return Standing(
        total=total,
        z=float(sign * (total - k * s.mean()) / spread) if known else float("nan"),
        median_member=float(np.median(ranks[rows])),
        least_member=float(ranks[rows].min()),
    )
