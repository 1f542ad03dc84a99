"""Many at once say, to the last bit, what one by one says."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from fine_bench.metrics import intervals
from fine_bench.metrics.consistency import agreement_of_runs, agreements, ranked
from fine_bench.metrics.intervals import mean_interval, pair_mean_interval, paired_difference
from fine_bench.metrics.kendall import kendall_taus
from fine_bench.metrics.many_intervals import mean_intervals, pair_mean_intervals, ties

SEEDS = (1, 2, 3, 4, 6, 7, 9, 13)


def some_values(rng: np.random.Generator) -> list[dict[int, float]]:
    """Values over different numbers of seeds, in any order, some equal, some undefined."""
    found = []
    for n in SEEDS * 4:
        seeds = rng.permutation(50)[:n].tolist()
        values = rng.normal(0.7, 0.1, n).tolist()
        found.append(dict(zip(seeds, values, strict=True)))
    found.append({0: 0.5, 1: 0.5, 2: 0.5})
    found.append({0: 0.5, 1: math.nan, 2: math.inf})
    return [found[i] for i in rng.permutation(len(found))]


def same(a: object, b: object) -> bool:
    return repr(a) == repr(b)  # NaN is itself, and every bit of a float counts


def test_mean_intervals_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = some_values(np.random.default_rng(0))
    one_by_one = [mean_interval(v) for v in values]
    assert same(mean_intervals(values), one_by_one)
    monkeypatch.setattr("fine_bench.metrics.many_intervals._NUMBERS", 100)  # in small chunks
    assert same(mean_intervals(values), one_by_one)
    assert mean_intervals([]) == []
    with pytest.raises(ValueError, match="values_by_seed is empty"):
        mean_intervals([{0: 1.0}, {}])
    with pytest.raises(ValueError, match="level must lie"):
        mean_intervals(values, 1.0)


def test_pair_intervals_are_those_of_one() -> None:
    rng = np.random.default_rng(1)
    values = [
        {pair: float(rng.normal(0.8, 0.1)) for pair in combinations(sorted(v), 2)}
        for v in some_values(rng)
        if len(v) > 1
    ]
    values[3] = dict.fromkeys(values[3], math.nan)
    assert same(pair_mean_intervals(values), [pair_mean_interval(v) for v in values])
    with pytest.raises(ValueError, match="is missing"):
        pair_mean_intervals([{(0, 1): 1.0, (1, 2): 1.0}])


def test_ties_are_those_of_one() -> None:
    rng = np.random.default_rng(2)
    pairs = []
    for n in SEEDS * 6:
        a = dict(enumerate(rng.normal(0.0, 1.0, n).tolist()))
        shift = float(rng.choice([0.0, 0.5, 3.0]))
        b = {seed + int(rng.random() < 0.1): x + shift + rng.normal() for seed, x in a.items()}
        pairs.append((a, b))
    pairs += [({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}), ({0: 1.0}, {1: 1.0})]
    undefined = dict.fromkeys(range(7), math.nan)
    pairs += [(undefined, undefined), (pairs[3][0], pairs[3][0])]

    def one(a: dict[int, float], b: dict[int, float]) -> bool:
        if len(a.keys() & b.keys()) < 2:
            return False
        found = paired_difference(a, b)
        if found.significant is not None:
            return not found.significant
        return found.lower <= 0.0 <= found.upper

    expected = [one(a, b) for a, b in pairs]
    assert 5 < sum(expected) < len(expected) - 5
    assert ties(pairs) == expected


@pytest.mark.parametrize("n", [2, 3, 64, 65, 500])
def test_kendall_is_scipys_to_the_last_bit(n: int) -> None:
    rng = np.random.default_rng(n)
    common = rng.normal(size=n)
    values = [common + rng.normal(size=n) for _ in range(3)]
    values += [np.round(common + rng.normal(size=n), 1), np.sign(common + 0.1), -common]
    pairs = [(a, b) for a in range(6) for b in range(6)]
    expected = [float(stats.kendalltau(values[a], values[b]).statistic) for a, b in pairs]
    assert same(kendall_taus(values, pairs), expected)


def test_kendall_counts_in_chunks_and_beyond_sixteen_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(5)
    long = [rng.normal(size=70_000) for _ in range(2)]
    expected = float(stats.kendalltau(*long).statistic)
    assert kendall_taus(long, [(0, 1)]) == [expected]
    values = [rng.normal(size=50) for _ in range(4)]
    pairs = list(combinations(range(4), 2))
    whole = kendall_taus(values, pairs)
    monkeypatch.setattr("fine_bench.metrics.kendall._NUMBERS", 100)
    assert kendall_taus(values, pairs) == whole


def test_agreement_does_not_depend_on_what_else_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(6)
    common = rng.normal(size=301)
    values = [common + rng.normal(size=301) for _ in range(3)]
    values += [np.round(values[0], 1), np.round(values[1]), np.zeros(301)]
    runs = [ranked(v, 60, "high") for v in values]
    pairs = list(combinations(range(6), 2))
    together = agreements(runs, pairs)
    assert same(together, [agreement_of_runs(runs[a], runs[b]) for a, b in pairs])
    for (a, b), found in zip(pairs, together, strict=True):
        if b < 5:
            assert found["spearman"] == float(stats.spearmanr(values[a], values[b]).statistic)
    assert all(math.isnan(x) for x in together[pairs.index((0, 5))].values())
    monkeypatch.setattr("fine_bench.metrics.consistency._EXACT_RANKS", 300)
    assert same(agreements(runs, pairs), together)
    assert agreements(runs, []) == []


def test_places_are_where_sorting_finds_the_percentiles() -> None:
    counts, weights = intervals.resamples(11)
    values = counts @ np.random.default_rng(7).normal(size=11)
    found = intervals.percentiles(values, weights, 0.9)
    low, high = intervals.percentiles(np.arange(float(len(values))), weights, 0.9)
    assert found == tuple(np.sort(values)[[int(low), int(high)]])
