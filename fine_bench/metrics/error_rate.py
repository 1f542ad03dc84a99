"""An error rate for deleting data: which examples are unlike verified ones, and how often wrongly?

Some training examples are *trusted*: somebody has looked at them and found them right. They stay
in the training set and are scored like the rest. With n trusted scores every other example gets
a conformal p-value,

    p_i = (1 + #{trusted at least as suspicious as i}) / (n + 1),

and Benjamini–Hochberg at a level α flags those that stand out together. Of the flagged examples
the share that is right after all (the false discovery proportion) is on average at most

    α · m_good / m,     m untrusted examples, m_good of them right,

for *any* score, good or bad: a poor score flags little, not wrongly (Bates, Candès, Lei, Romano
and Sesia 2023; under exchangeability alone Mary and Roquain 2022). "On average" is over the draw of
the trusted set; in a single use the proportion may well be higher.

What it rests on is that the trusted scores and those of the untrusted good examples are
*exchangeable*: any n of the good ones could as well have been the trusted. Drawing the trusted at
random from the data, looking at each and keeping those that are right, gives that, even for
one run with its scores held fixed. It fails

- when somebody chose the trusted examples: typical, clear or confident ones are less suspicious
  than the average good example, p-values come out too small and more is flagged wrongly than α;
- when suspicious ones were dropped from the trusted although they are right: the same;
- when the trusted were not trained on like the rest (held out, seen more often, weighted): a
  score that measures the effect of training then differs for another reason than the label;
- when they come from another source, class mix or time than the data to be cleaned;
- when the score was chosen, among several, by what it flagged with these very trusted examples.

Wrong examples among the trusted do not add false flags, they hide bad examples: a bad trusted
example is as suspicious as those that are looked for. Once their share among the trusted passes
about α times the share of bad examples in the data, nothing can be flagged any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import rankdata
from torch import Tensor

from fine_bench.metrics._arrays import ArrayLike, End
from fine_bench.metrics.detection import suspicion
from fine_bench.metrics.intervals import Interval
from fine_bench.seeds import derive
from fine_bench.theory.false_discovery import benjamini_hochberg, conformal_p_values

Mask: TypeAlias = NDArray[np.bool_]
Vector: TypeAlias = NDArray[np.float64]
Choice: TypeAlias = Literal["random", "easy", "noisy"]

MIN_DRAWS = 20
NOISY_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Flags:
    """Which of n examples are flagged.

    Attributes:
        flagged: ``(n,)`` boolean, False for the trusted.
        p_values: ``(n,)`` conformal p-values, NaN for the trusted.
        adjusted: ``(n,)`` the smallest level at which each would be flagged, NaN for the trusted.
        trusted: ``(n,)`` boolean.
        level: the false discovery rate asked for.
    """

    flagged: Mask
    p_values: Vector
    adjusted: Vector
    trusted: Mask
    level: float

    @property
    def n_flagged(self) -> int:
        """Number of flagged examples."""
        return int(self.flagged.sum())

    @property
    def n_trusted(self) -> int:
        """Number of trusted examples."""
        return int(self.trusted.sum())

    @property
    def n_tested(self) -> int:
        """Number of examples that have a p-value."""
        return len(self.trusted) - self.n_trusted

    @property
    def least(self) -> int:
        """The fewest examples that can be flagged at all; see ``least_discoveries``."""
        return least_discoveries(self.n_trusted, self.n_tested, self.level)


@dataclass(frozen=True)
class Realised:
    """How a set of flags compares with the truth.

    Attributes:
        n_flagged: number of flagged examples.
        false_share: false discovery proportion, good ones among the flagged; 0 when none is.
        power: share of the untrusted bad examples that are flagged; NaN when there are none.
    """

    n_flagged: int
    false_share: float
    power: float


@dataclass(frozen=True)
class Rate:
    """What a level held over repeated draws of the trusted set.

    Attributes:
        level, n_trusted, n_tested: as asked for.
        n_draws, n_seeds: number of trusted sets, and of runs that each was used with.
        flagged: mean number of flagged examples.
        false_share: mean false discovery proportion with its interval.
        power: mean power.
        jaccard: mean over pairs of runs, same trusted set, of the overlap of their flagged sets;
            NaN with one run or when nothing was ever flagged.
    """

    level: float
    n_trusted: int
    n_tested: int
    n_draws: int
    n_seeds: int
    flagged: float
    false_share: Interval
    power: float
    jaccard: float

    @property
    def exceeded(self) -> bool:
        """Whether the whole interval of the false discovery proportion lies above the level."""
        return self.false_share.lower > self.level


def least_discoveries(n_trusted: int, n_tested: int, level: float) -> int:
    """The fewest examples that Benjamini–Hochberg can flag: k with 1/(n + 1) ≤ level · k / m.

    No p-value is smaller than 1/(n + 1), so fewer than k that stand out are not found.
    """
    return max(int(np.ceil(n_tested / (level * (n_trusted + 1)) - 1e-9)), 1)


def trusted_mask(trusted: Any, n: int) -> Mask:
    """Trusted examples as a mask ``(n,)``, from a mask or from distinct positions 0 … n − 1.

    Raises:
        ValueError: positions that repeat or do not exist, a mask of another length, none, or all.
    """
    given = trusted.cpu().numpy() if isinstance(trusted, Tensor) else np.asarray(trusted)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "biu"):
        raise ValueError(
            f"trusted must be a boolean vector or whole-numbered positions, got {given.dtype} of "
            f"shape {given.shape}"
        )
    if given.dtype == np.bool_:
        if len(given) != n:
            raise ValueError(f"trusted has {len(given)} entries for {n} examples")
        mask = given.copy()
    else:
        if given.size and not (given.min() >= 0 and given.max() < n):
            raise ValueError(
                f"trusted names positions from {given.min()} to {given.max()}, but there are {n} "
                f"examples, counted 0 … {n - 1}"
            )
        values, counts = np.unique(given, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"trusted names position {values[counts > 1][0]} more than once; name each once"
            )
        mask = np.zeros(n, dtype=np.bool_)
        mask[given.astype(np.int64)] = True
    if not mask.any():
        raise ValueError("no example is trusted; verify a few hundred, drawn at random")
    if mask.all():
        raise ValueError("all examples are trusted, so there is nothing left to flag")
    return mask


def flag(scores: ArrayLike, trusted: Any, level: float = 0.1, end: End = "high") -> Flags:
    """Flag the examples that are unlike the trusted ones, at a false discovery rate of ``level``.

    Args:
        scores: ``(n,)`` or ``(n_query, n)`` finite scores of *all* training examples, the trusted
            among them; several rows are summarised by their mean.
        trusted: boolean ``(n,)`` or positions; see the module for how they must be chosen.
        level: in (0, 1).
        end: the suspicious end of the scores (``types.SUSPICIOUS_END`` of the target).

    Raises:
        ValueError: too few trusted examples for any discovery, with the number needed; scores
            that are not finite; a bad ``trusted``.
    """
    values = suspicion(scores, end)
    mask = trusted_mask(trusted, len(values))
    p = conformal_p_values(values[~mask], values[mask], "high", level=level)
    found = benjamini_hochberg(p, level)
    p_values, adjusted = np.full(len(values), np.nan), np.full(len(values), np.nan)
    flagged = np.zeros(len(values), dtype=np.bool_)
    p_values[~mask], adjusted[~mask], flagged[~mask] = p, found.adjusted, found.rejected
    return Flags(flagged, p_values, adjusted, mask, level)


def evaluate(flags: Flags, is_bad: Tensor | NDArray[Any]) -> Realised:
    """Compare flags with planted truth ``is_bad (n,)``, boolean; the trusted do not count."""
    return _realised(flags.flagged, _truth(is_bad, len(flags.flagged)) & ~flags.trusted)


def _realised(flagged: Mask, bad: Mask) -> Realised:
    n, hits, n_bad = int(flagged.sum()), int((flagged & bad).sum()), int(bad.sum())
    return Realised(n, (n - hits) / n if n else 0.0, hits / n_bad if n_bad else float("nan"))


def agreement_of_flags(a: Mask, b: Mask) -> float:
    """Jaccard index |A ∩ B| / |A ∪ B| of two flagged sets; NaN when both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else float("nan")


def draw_trusted(
    is_bad: Mask,
    n_trusted: int,
    rng: np.random.Generator,
    choice: Choice = "random",
    suspicions: Vector | None = None,
) -> Mask:
    """A trusted set, ``(n,)`` boolean.

    ``choice``: "random" draws from the good examples, which is what the error rate asks for. The
    others break it on purpose: "easy" draws from the less suspicious half of the good examples
    (needs ``suspicions`` ``(n,)``), as a person does who picks clear cases; "noisy" lets 1 % of
    the trusted be bad, at least one.

    Raises:
        ValueError: not enough examples to draw from.
    """
    if choice not in get_args(Choice):
        raise ValueError(f"choice must be one of {get_args(Choice)}, got {choice!r}")
    good = np.flatnonzero(~is_bad)
    if n_trusted < 1 or 2 * n_trusted > len(good):
        raise ValueError(
            f"{n_trusted} trusted of {len(good)} good examples: at least 1 and at most half of "
            f"them, {len(good) // 2}, can be trusted, so that enough remain to be tested"
        )
    n_wrong = 0
    if choice == "easy":
        if suspicions is None:
            raise ValueError('choice="easy" needs suspicions, by which examples are easy')
        order = np.argsort(suspicions[good], kind="stable")
        good = good[order[: (len(good) + 1) // 2]]
    elif choice == "noisy":
        n_wrong = min(max(round(NOISY_SHARE * n_trusted), 1), int(is_bad.sum()))
    mask = np.zeros(len(is_bad), dtype=np.bool_)
    mask[rng.choice(good, n_trusted - n_wrong, replace=False)] = True
    if n_wrong:
        mask[rng.choice(np.flatnonzero(is_bad), n_wrong, replace=False)] = True
    return mask


def repeated(
    scores_by_seed: Mapping[int, ArrayLike],
    is_bad: Tensor | NDArray[Any],
    *,
    n_trusted: int,
    levels: Sequence[float] = (0.05, 0.1),
    end: End = "high",
    n_draws: int = MIN_DRAWS,
    seed: int = 0,
    choice: Choice = "random",
) -> list[Rate]:
    """Draw trusted sets again and again, flag, and measure against the truth; one Rate a level.

    Each trusted set is used with every run's scores, so that runs can be compared. A draw counts
    with the mean over runs; the interval (95 %, Student's t over the draws, which are independent)
    is for these runs: it says how well the mean over draws is known, not how other runs do.

    Args:
        scores_by_seed: run seed → scores as in ``flag``.
        is_bad: ``(n,)`` planted truth.
        n_trusted: size of each trusted set.
        levels: false discovery rates.
        end: suspicious end of the scores.
        n_draws: at least 20.
        seed: of the draws.
        choice: how the trusted are drawn; see ``draw_trusted``.

    Raises:
        ValueError: fewer than 20 draws, no runs, no levels, and whatever ``flag`` and
            ``draw_trusted`` refuse.
    """
    if n_draws < MIN_DRAWS:
        raise ValueError(f"n_draws must be at least {MIN_DRAWS}, got {n_draws}")
    if not scores_by_seed or not levels:
        raise ValueError("repeated needs the scores of at least one run, and at least one level")
    runs = [suspicion(scores_by_seed[s], end) for s in sorted(scores_by_seed)]
    bad = _truth(is_bad, len(runs[0]))
    easy = np.mean([rankdata(run) for run in runs], axis=0) if choice == "easy" else None
    rng = np.random.default_rng(derive(seed, f"error rate/{choice}"))
    results: list[list[Realised]] = [[] for _ in levels]
    overlaps: list[list[float]] = [[] for _ in levels]
    for _ in range(n_draws):
        mask = draw_trusted(bad, n_trusted, rng, choice, easy)
        # adjusted p-values serve every level; the smallest one decides on the refusal
        adjusted = [flag(run, mask, min(levels)).adjusted for run in runs]
        for i, level in enumerate(levels):
            sets = [np.asarray(a <= level, dtype=np.bool_) for a in adjusted]
            results[i] += [_realised(flagged, bad & ~mask) for flagged in sets]
            overlaps[i] += [
                agreement_of_flags(a, b) for j, a in enumerate(sets) for b in sets[j + 1 :]
            ]
    return [
        Rate(
            level=level,
            n_trusted=n_trusted,
            n_tested=len(bad) - n_trusted,
            n_draws=n_draws,
            n_seeds=len(runs),
            flagged=float(np.mean([r.n_flagged for r in found])),
            false_share=_mean_of_draws([r.false_share for r in found], n_draws),
            power=float(np.mean([r.power for r in found])),
            jaccard=_mean_of_defined(overlap),
        )
        for level, found, overlap in zip(levels, results, overlaps, strict=True)
    ]


def _mean_of_draws(values: Sequence[float], n_draws: int) -> Interval:
    """Mean with Student's 95 % interval over draws; ``values`` runs over draws, then runs."""
    draws = np.asarray(values).reshape(n_draws, -1).mean(axis=1)
    mean = float(draws.mean())
    reach = float(stdtrit(n_draws - 1, 0.975) * draws.std(ddof=1) / np.sqrt(n_draws))
    return Interval(mean, max(mean - reach, 0.0), min(mean + reach, 1.0))


def _mean_of_defined(values: Sequence[float]) -> float:
    defined = [value for value in values if value == value]
    return float(np.mean(defined)) if defined else float("nan")


def _truth(is_bad: Tensor | NDArray[Any], n: int) -> Mask:
    bad = np.asarray(is_bad.cpu().numpy() if isinstance(is_bad, Tensor) else is_bad)
    if bad.dtype != np.bool_ or bad.shape != (n,):
        raise ValueError(
            f"is_bad must be boolean of shape ({n},), got {bad.dtype} of shape {bad.shape}"
        )
    return bad
