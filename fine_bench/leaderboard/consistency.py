"""Agreement between the seeds of a row: from kept comparisons where possible, else from scores.

What is compared is what detection ranks: one suspicion an example (``metrics.detection``). A
comparison is kept beside the records, so that later rebuilds need no scores; it is named after the
digests of what was compared, so it never goes stale, and carries a digest of its numbers. One that
was kept without, or by an earlier version of the metrics, is computed again where all of its scores
are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.leaderboard.tables import Stat
from fine_bench.metrics.consistency import (
    agreements,
    coefficient_of_variation,
    ranked,
)
from fine_bench.metrics.detection import suspicion
from fine_bench.metrics.many_intervals import pair_mean_intervals
from fine_bench.metrics.registry import stat_key
from fine_bench.metrics.stable import stable_metrics
from fine_bench.store.comparisons import Consistency
from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore
from fine_bench.store.scores import asked_about, carried_truth
from fine_bench.types import SUSPICIOUS_END, InfluenceScores, RunRecord

METRIC_VERSION = 2
"""Of the consistency metrics; raise it when their values may change, and caches are made anew."""

READ = (1, METRIC_VERSION)
"""Versions whose numbers still hold. 1 has no ``metrics.stable``; its rows lack those numbers until
their scores are at hand."""

LEVEL = 0.95

Where: TypeAlias = tuple[str, str, str, str]
Pair: TypeAlias = tuple[str, str]


class Comparisons:
    """Comparisons of seeds: those that are kept, and new ones, which it keeps.

    Each pair of scores is kept once, in the comparison that first needed it: a row whose seeds are
    added one by one keeps as many pairs as it has, and not all of them again at every seed.

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
        same: Consistency | None = None
        earlier: Consistency | None = None
        kept: set[Pair] = set()  # by this version
        for old in sorted(self.kept.get(row, ()), key=lambda found: -found.metric_version):
            if old.k != k or old.metric_version not in READ:
                continue
            if not old.sealed:
                if at_hand is None:
                    at_hand = all(self.store.has_scores(r) for r in finished.values())
                if at_hand:  # nothing says that its numbers are those that were written
                    continue
            # seeds were added: their old pairs still hold
            found = {_pair(old.scores, a, b): values for (a, b), values in old.pairs.items()}
            pairs |= found
            if old.metric_version == METRIC_VERSION:
                kept |= found.keys()
                same = old if old.scores == scores else same
            elif old.scores == scores:
                earlier = old
        known = {s: pairs[pair] for s, pair in wanted.items() if pair in pairs}
        whole = len(known) == len(wanted)
        if whole and same is not None:
            return replace(same, pairs=known), ""
        fallback = replace(earlier, pairs=known) if whole and earlier is not None else None
        if fallback and not all(self.store.has_scores(r) for r in finished.values()):
            return fallback, ""
        try:
            variation = self._compare(finished, wanted, k, pairs)
        except (StoreError, ValueError) as error:
            if not whole:
                return None, f"no consistency: {error}"
            return fallback or Consistency(*row, k, METRIC_VERSION, scores, known), ""
        known = {seeds: pairs[pair] for seeds, pair in wanted.items()}
        result = Consistency(*row, k, METRIC_VERSION, scores, known, variation)
        # what the file of its name has already stays in it
        own = set() if same is None else same.pairs.keys()
        new = {s: known[s] for s, pair in wanted.items() if pair not in kept or s in own}
        try:
            self.store.save_consistency(replace(result, pairs=new))
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
        vectors = {seed: suspicion(_asked(found), end) for seed, found in loaded.items()}
        # two runs may have the same scores: the first pair of seeds stands for all that have them
        every = reversed(list(wanted.items()))
        missing = {pair: seeds for seeds, pair in every if pair not in pairs}
        new = sorted({seed for seeds in missing.values() for seed in seeds})
        runs = [ranked(vectors[seed], max(k, 1), "high") for seed in new]
        places = [(new.index(a), new.index(b)) for a, b in missing.values()]
        for pair, values in zip(missing, agreements(runs, places), strict=True):
            pairs[pair] = values if k else _without_k(values)
        together = np.stack(list(vectors.values()))
        found = {"cv_median": coefficient_of_variation(together)[1]}
        if k and bad[0] is not None and bad[0].any():
            found |= stable_metrics(together, bad[0], k)
        return found


def _bad_ones(scores: InfluenceScores) -> NDArray[np.bool_] | None:
    """Which of the scored examples of known truth are bad, where the scores say so."""
    truth = carried_truth(scores)
    if truth is None:
        return None
    asked = asked_about(truth, scores.watched)
    bad = truth.is_bad if asked is None else truth.is_bad[asked]
    return np.asarray(bad.numpy(), dtype=np.bool_)


def _asked(scores: InfluenceScores) -> Tensor:
    """The values that detection ranks: of the scored examples of which the truth is known."""
    asked = asked_about(carried_truth(scores), scores.watched)
    return scores.values if asked is None else scores.values[:, asked]


def _watched_ones(scores: InfluenceScores) -> tuple[int, ...] | None:
    return None if scores.watched is None else tuple(scores.watched.tolist())


def _pair(scores: Mapping[int, str], a: int, b: int) -> Pair:
    """Digests of what was compared, in an order that does not depend on the seeds' numbers."""
    return min(scores[a], scores[b]), max(scores[a], scores[b])


def _without_k(values: Mapping[str, float]) -> dict[str, float]:
    """What is left where nobody knows the bad examples."""
    return {name: x for name, x in values.items() if not name.startswith("jaccard")}


def consistency_stats(compared: Sequence[Consistency | None]) -> list[dict[str, Stat]]:
    """Mean and interval over pairs of seeds of every number of each comparison, by key."""
    asked = [
        (i, one, name, {pair: found.get(name, math.nan) for pair, found in one.pairs.items()})
        for i, one in enumerate(compared)
        if one is not None
        for name in sorted({name for values in one.pairs.values() for name in values})
    ]
    intervals = pair_mean_intervals([values for *_, values in asked], LEVEL)
    stats: list[dict[str, Stat]] = [{} for _ in compared]
    for (i, one, name, _), interval in zip(asked, intervals, strict=True):
        stats[i][stat_key("consistency", name)] = Stat(*interval, n=len(one.scores))
    for found, comparison in zip(stats, compared, strict=True):
        for name, value in comparison.variation.items() if comparison else ():
            stat = Stat(value, math.nan, math.nan, len(comparison.scores) if comparison else 0)
            found[stat_key("consistency", name)] = stat
    return stats
