"""Agreement between the seeds of a row: from kept comparisons where possible, else from scores.

What is compared is what detection ranks: one suspicion an example (``metrics.detection``). A
comparison is kept beside the records, so that later rebuilds need no scores; it is named after the
digests of what was compared, so it never goes stale, and carries a digest of its numbers. One that
was kept without, or by an earlier version of the metrics, is computed again where all of its scores
are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fine_bench.leaderboard.tables import Stat
from fine_bench.metrics.consistency import (
    Run,
    agreement_of_runs,
    coefficient_of_variation,
    ranked,
)
from fine_bench.metrics.detection import suspicion
from fine_bench.metrics.intervals import pair_mean_interval
from fine_bench.metrics.registry import stat_key
from fine_bench.metrics.stable import stable_metrics
from fine_bench.store.comparisons import Consistency, consistency_digest
from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore
from fine_bench.types import SUSPICIOUS_END, InfluenceScores, RunRecord

METRIC_VERSION = 2
"""Of the consistency metrics; raise it when their values may change, and caches are made anew."""

READ = (1, METRIC_VERSION)
"""Versions whose numbers still hold. 1 has no ``metrics.stable``; its rows lack those numbers until
their scores are at hand."""

IS_BAD = "truth/is_bad"
"""Among the extras of scores: which training examples are bad."""

LEVEL = 0.95

Where: TypeAlias = tuple[str, str, str, str]
Pair: TypeAlias = tuple[str, str]


class Comparisons:
    """Comparisons of seeds: those that are kept, and new ones, which it keeps.

    Args:
        store: where scores are read and comparisons are kept.
        kept: what ``store.scan()`` found of them.
    """

    def __init__(self, store: RecordStore, kept: Iterable[Consistency]) -> None:
        self.store = store
        self.kept: dict[Where, list[Consistency]] = {}
        for one in kept:
            where = (one.task, one.setting, one.estimator, one.target)
            self.kept.setdefault(where, []).append(one)

    def of(self, finished: Mapping[int, RunRecord], k: int) -> tuple[Consistency | None, str]:
        """The comparison of a row's finished seeds.

        Returns:
            the comparison (``None`` below two seeds, or when it cannot be made) and what went
            wrong, empty when nothing did.
        """
        if len(finished) < 2:
            return None, ""
        first = next(iter(finished.values()))
        if first.metrics.get("n_watched") == 0:  # it scores groups, and no single example
            return None, ""
        if first.target not in SUSPICIOUS_END:
            return None, f"unknown target {first.target!r}, so no consistency"
        row = (first.task, first.setting, first.estimator, first.target)
        scores = {seed: record.scores_sha256 for seed, record in sorted(finished.items())}
        wanted = {(a, b): _pair(scores, a, b) for a, b in combinations(scores, 2)}
        pairs: dict[Pair, Mapping[str, float]] = {}
        at_hand: bool | None = None
        earlier: Consistency | None = None
        for old in sorted(self.kept.get(row, ()), key=lambda found: -found.metric_version):
            if old.k != k or old.metric_version not in READ:
                continue
            if not old.sealed:
                if at_hand is None:
                    at_hand = all(self.store.has_scores(r) for r in finished.values())
                if at_hand:  # nothing says that its numbers are those that were written
                    continue
            if old.pairs.keys() == wanted.keys():
                name = consistency_digest(scores, k, old.metric_version)
                if old.digest == name and old.metric_version == METRIC_VERSION:
                    return old, ""
                earlier = old if old.digest == name else earlier
            # seeds were added: their old pairs still hold
            pairs |= {_pair(old.scores, a, b): values for (a, b), values in old.pairs.items()}
        if earlier is not None and not all(self.store.has_scores(r) for r in finished.values()):
            return earlier, ""
        try:
            variation = self._compare(finished, wanted, k, pairs)
        except (StoreError, ValueError) as error:
            if earlier is not None:
                return earlier, ""
            if any(pair not in pairs for pair in wanted.values()):
                return None, f"no consistency: {error}"
            variation = {}
        known = {seeds: pairs[pair] for seeds, pair in wanted.items()}
        result = Consistency(*row, k, METRIC_VERSION, scores, known, variation)
        if not variation:
            return result, ""
        try:
            self.store.save_consistency(result)
        except StoreError as error:
            return result, str(error)
        return result, ""

    def _compare(
        self,
        finished: Mapping[int, RunRecord],
        wanted: Mapping[tuple[int, int], Pair],
        k: int,
        pairs: dict[Pair, Mapping[str, float]],
    ) -> dict[str, float]:
        """Compare the pairs that are not known yet; returns the numbers over all seeds."""
        end = next(iter(finished.values())).end
        loaded = {seed: self.store.load_scores(finished[seed]) for seed in sorted(finished)}
        if len({_watched_ones(found) for found in loaded.values()}) > 1:
            raise ValueError("its seeds score different examples; set sample_seed to one number")
        if len(sizes := {found.values.shape[1] for found in loaded.values()}) > 1:
            raise ValueError(f"its seeds score {sorted(sizes)} examples of the same data")
        bad = [_bad_ones(scores) for scores in loaded.values()]
        truths = {None if one is None else one.tobytes() for one in bad}
        if len(truths) > 1:
            raise ValueError("its seeds do not agree on which examples are bad")
        vectors = {seed: suspicion(found.watched_values, end) for seed, found in loaded.items()}
        missing = {seeds: pair for seeds, pair in wanted.items() if pair not in pairs}
        new = {seed for pair in missing for seed in pair}
        runs = {seed: ranked(vectors[seed], max(k, 1), "high") for seed in new}
        for (a, b), pair in missing.items():
            if pair not in pairs:  # two runs may have the same scores
                pairs[pair] = _agreement(runs[a], runs[b], k)
        together = np.stack(list(vectors.values()))
        found = {"cv_median": coefficient_of_variation(together)[1]}
        if k and bad[0] is not None and bad[0].any():
            found |= stable_metrics(together, bad[0], k)
        return found


def _bad_ones(scores: InfluenceScores) -> NDArray[np.bool_] | None:
    """Which of the scored examples are bad, where the scores say so."""
    bad = scores.extras.get(IS_BAD)
    if bad is None:
        return None
    return (bad if scores.watched is None else bad[scores.watched]).bool().numpy()


def _watched_ones(scores: InfluenceScores) -> tuple[int, ...] | None:
    return None if scores.watched is None else tuple(scores.watched.tolist())


def _pair(scores: Mapping[int, str], a: int, b: int) -> Pair:
    """Digests of what was compared, in an order that does not depend on the seeds' numbers."""
    return min(scores[a], scores[b]), max(scores[a], scores[b])


def _agreement(a: Run, b: Run, k: int) -> dict[str, float]:
    values = agreement_of_runs(a, b)
    if k == 0:  # nobody knows the bad examples, so there is no k
        return {name: x for name, x in values.items() if not name.startswith("jaccard")}
    return values


def consistency_stats(consistency: Consistency | None) -> dict[str, Stat]:
    """Mean and interval over pairs of seeds of every number of a comparison, by key."""
    if consistency is None:
        return {}
    n = len(consistency.scores)
    stats = {}
    for name in sorted({name for values in consistency.pairs.values() for name in values}):
        values = {pair: found.get(name, math.nan) for pair, found in consistency.pairs.items()}
        stats[stat_key("consistency", name)] = Stat(*pair_mean_interval(values, LEVEL), n=n)
    for name, value in consistency.variation.items():
        stats[stat_key("consistency", name)] = Stat(value, math.nan, math.nan, n)
    return stats
