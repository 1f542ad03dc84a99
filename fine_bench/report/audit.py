"""What an auditor asks: how much could be told about a subset?

Reads records and scores. Each piece of evidence gives the (ε, δ) curves that a subset's μ implies,
with the sentence that says whether it is a lower bound (what one statistic shows) or an upper bound
(composition over the steps).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fine_bench.errors import DataError
from fine_bench.store.records import RecordStore
from fine_bench.theory.privacy import PrivacyCurve, privacy_curve
from fine_bench.types import RunRecord


@dataclass(frozen=True)
class Evidence:
    """What one record says of a subset.

    Attributes:
        seed: run seed.
        mu: signed μ̂ of one statistic.
        lower, upper: its interval, if the record has one; else ``mu`` twice.
        composed: μ composed over the steps, ≥ 0.
    """

    seed: int
    mu: float
    lower: float
    upper: float
    composed: float

    @property
    def sure(self) -> float:
        """The end of the interval nearer 0; 0 if it holds 0."""
        if self.lower <= 0.0 <= self.upper:
            return 0.0
        return min(self.lower, self.upper, key=abs)

    def curves(self) -> list[PrivacyCurve]:
        """The lower bound (at the interval's level) and the upper bound."""
        return [privacy_curve(self.sure, "statistic"), privacy_curve(self.composed, "composition")]


def of_group(records: Iterable[RunRecord], group: str) -> list[Evidence]:
    """Evidence on a group from the records of the paper's estimator.

    Raises:
        DataError: no record has the group (the message names those that exist), or one lacks a
            number of it.
    """
    found, known = [], set()
    for record in records:
        names = {key.split("/")[1] for key in record.metrics if key.startswith("group/")}
        known |= names
        if group in names:
            keys = [f"group/{group}/{name}" for name in ("mu", "lower", "upper", "mu_run")]
            lacking = [key for key in keys if key not in record.metrics]
            if lacking:
                raise DataError(
                    f"the record of {record.estimator} seed {record.seed} lacks "
                    f"{', '.join(lacking)}: it was cut or edited; compute it again with force=true"
                )
            mu, lower, upper, of_run = (record.metrics[key] for key in keys)
            found.append(Evidence(record.seed, mu, lower, upper, abs(of_run)))
    if not found:
        raise DataError(
            f"no record holds the group {group!r}; "
            + (f"there are: {', '.join(sorted(known))}" if known else "run estimator=fine_paper")
        )
    return sorted(found, key=lambda e: e.seed)


def of_example(store: RecordStore, records: Iterable[RunRecord], example: int) -> list[Evidence]:
    """Evidence on one training example from the all-example f-INE scores.

    Raises:
        DataError: no scores with a composed bound, or no such example.
        StoreError: scores cannot be read.
    """
    found = []
    for record in records:
        scores = store.load_scores(record)
        if "bound" not in scores.extras or scores.values.shape[0] != 1:
            continue
        n = scores.values.shape[1]
        if not 0 <= example < n:
            raise DataError(f"example {example} is out of range; the task has 0 … {n - 1}")
        mu = float(scores.values[0, example])
        found.append(Evidence(record.seed, mu, mu, mu, float(scores.extras["bound"][0, example])))
    if not found:
        raise DataError("no scores of f-INE with one row were found; run estimator=fine")
    return sorted(found, key=lambda e: e.seed)
