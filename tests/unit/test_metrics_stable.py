"""Found in every run: against counting by hand and by enumeration, and in the leaderboard."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from fine_bench.leaderboard import consistency, render
from fine_bench.leaderboard.build import build
from fine_bench.metrics.stable import SHARES, flagged_by, stable_metrics
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores
from support.records import make_record

N, K = 40, 8
BAD = np.arange(N) < K


def noisy(n_runs: int, seed: int = 0, noise: float = 0.8) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return 2.0 * BAD + noise * draw.standard_normal((n_runs, N))


@pytest.mark.parametrize("n_runs", [2, 3, 4, 5])
def test_counts_of_sets_without_ties(n_runs: int) -> None:
    runs = noisy(n_runs)
    bad = set(np.flatnonzero(BAD))
    found = stable_metrics(runs, BAD, K)

    def flagged(k: int) -> list[set[int]]:
        return [set(np.argsort(-run)[:k].tolist()) for run in runs]

    sets = flagged(K)
    every = set.intersection(*sets)
    half = {i for i in range(N) if 2 * sum(i in s for s in sets) >= n_runs}
    assert 0 < len(every & bad) < len(every | bad)  # neither nothing nor everything agrees
    assert found["stable_recall"] == pytest.approx(len(every & bad) / K)
    assert found["stable_precision"] == pytest.approx(len(every & bad) / len(every))
    assert found["majority_recall"] == pytest.approx(len(half & bad) / K)
    assert found["majority_precision"] == pytest.approx(len(half & bad) / len(half))
    right = [len(a & b & bad) / len(a & b) for a, b in combinations(sets, 2)]
    assert found["agreeing_precision"] == pytest.approx(np.mean(right))
    for share, name in zip(SHARES, ("5", "10", "20"), strict=True):
        top = flagged(round(share * N))
        every = set.intersection(*top)
        assert found[f"stable_recall_top_{name}"] == pytest.approx(len(every & bad) / K)
        expected = len(every & bad) / len(every) if every else np.nan
        assert found[f"stable_precision_top_{name}"] == pytest.approx(expected, nan_ok=True)
        jaccard = [len(a & b) / len(a | b) for a, b in combinations(top, 2)]
        assert found[f"jaccard_top_{name}"] == pytest.approx(np.mean(jaccard))


def test_ties_are_counted_by_all_orders() -> None:
    """Each run breaks its ties at random, independently: the mean over all pairs of orders."""
    runs = np.array([[2.0, 1, 1, 1, 0], [1.0, 1, 1, 0, 2]])
    bad = np.array([True, True, False, False, False])

    def orders(run: np.ndarray) -> list[set[int]]:
        return [
            set(sorted(range(5), key=lambda i, o=order: (-run[i], o.index(i)))[:2])
            for order in permutations(range(5))
        ]

    pairs = [(a & b) for a, b in product(*map(orders, runs))]
    right = np.mean([len(both & {0, 1}) for both in pairs])
    found = stable_metrics(runs, bad, 2)
    assert found["stable_recall"] == pytest.approx(right / 2)
    assert found["stable_precision"] == pytest.approx(right / np.mean([len(b) for b in pairs]))


def test_the_probability_of_a_count_is_that_of_enumeration() -> None:
    chances = np.random.default_rng(1).random((4, 6))
    for least in range(5):
        expected = np.zeros(6)
        for flags in product((0, 1), repeat=4):
            if sum(flags) >= least:
                flag = np.array(flags)[:, None]
                expected += np.prod(np.where(flag == 1, chances, 1 - chances), axis=0)
        np.testing.assert_allclose(flagged_by(chances, least), expected, rtol=1e-12)


def test_bounds_and_undefined_values() -> None:
    runs = noisy(4)
    worst = min(BAD[np.argsort(-run)[:K]].mean() for run in runs)
    assert stable_metrics(runs, BAD, K)["stable_recall"] <= worst
    assert (
        stable_metrics(runs[:2], BAD, K)["stable_recall"]
        >= stable_metrics(runs, BAD, K)["stable_recall"]
    )
    constant = stable_metrics(np.stack([runs[0], np.zeros(N)]), BAD, K)
    assert all(np.isnan(x) for x in constant.values())
    opposite = stable_metrics(np.stack([np.arange(N), -np.arange(N)]).astype(float), BAD, K)
    assert opposite["stable_recall"] == 0
    assert np.isnan(opposite["stable_precision"])  # no example is flagged by both


def test_refusals() -> None:
    runs = noisy(3)
    with pytest.raises(ValueError, match="at least 2, got"):
        stable_metrics(runs[:1], BAD, K)
    with pytest.raises(ValueError, match="is_bad must be boolean of shape"):
        stable_metrics(runs, BAD[1:], K)
    with pytest.raises(ValueError, match="no example is bad"):
        stable_metrics(runs, np.zeros(N, dtype=np.bool_), K)
    with pytest.raises(ValueError, match="k must be from 1 to the number of examples, 40; got 41"):
        stable_metrics(runs, BAD, N + 1)


# -------------------------------------------------------------------------- in the leaderboard


def filled(root: Path, with_truth: bool = True) -> RecordStore:
    store = RecordStore(root)
    for seed, values in enumerate(noisy(3)):
        extras = {"truth/is_bad": torch.from_numpy(BAD)} if with_truth else {}
        record = make_record(seed=seed, metrics={"auroc": 0.9, "n_bad": float(K)})
        scores = torch.from_numpy(values)[None]
        store.save(record, InfluenceScores(scores, "fine", "self", extras=extras))
    return store


def test_the_leaderboard_shows_it_and_keeps_it(tmp_path: Path) -> None:
    store = filled(tmp_path)
    (row,) = build(store).tables[0].rows
    expected = stable_metrics(noisy(3), BAD, K)
    for name, value in expected.items():
        assert row.stats[f"consistency_{name}"].mean == pytest.approx(value, nan_ok=True)
    board = build(store)
    text = render.to_markdown(board)
    assert "found in all runs ↑" in text
    assert f"| {expected['stable_recall']:.3f} |" in text
    shutil.rmtree(tmp_path / "scores")
    assert render.to_markdown(build(RecordStore(tmp_path))) == text


def test_scores_that_say_nothing_of_the_truth_have_none(tmp_path: Path) -> None:
    (row,) = build(filled(tmp_path, with_truth=False)).tables[0].rows
    assert "consistency_spearman" in row.stats
    assert "consistency_stable_recall" not in row.stats


def test_comparisons_of_the_version_before_hold_until_scores_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path / "all")
    with monkeypatch.context() as patched:  # what the version before has left
        patched.setattr(consistency, "METRIC_VERSION", 1)
        patched.setattr(consistency, "stable_metrics", lambda *_: {})
        build(store)
    records = tmp_path / "alone"
    shutil.copytree(tmp_path / "all" / "records", records / "records")
    board = build(RecordStore(records))
    assert board.problems == ()
    (row,) = board.tables[0].rows
    assert "consistency_jaccard" in row.stats
    assert "consistency_stable_recall" not in row.stats
    assert "–" in render.to_markdown(board)
    (now,) = build(store).tables[0].rows  # its scores are here
    assert "consistency_stable_recall" in now.stats
    assert now.stats["consistency_jaccard"] == row.stats["consistency_jaccard"]
    # both stand beside each other, and the newer one counts
    names = [path.name for path in (tmp_path / "all").rglob("consistency--*.json")]
    assert len(names) == 2
    shutil.rmtree(tmp_path / "all" / "scores")
    assert build(RecordStore(tmp_path / "all")).tables[0].rows == (now,)
    # a damaged score file leaves what was kept
    path = next((tmp_path / "alone").rglob("fine--self--seed0*.json"))
    (records / "scores").mkdir()
    for record in store.scan().records:
        where = records / "scores" / record.scores_file
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(b"nothing")
    assert path.is_file()
    assert build(RecordStore(records)).tables[0].rows == (row,)


def test_runs_that_disagree_on_the_truth_are_named(tmp_path: Path) -> None:
    store = filled(tmp_path)
    other = torch.from_numpy(BAD[::-1].copy())
    scores = InfluenceScores(torch.randn(1, N), "fine", "self", extras={"truth/is_bad": other})
    store.save(replace(make_record(seed=3), metrics={"auroc": 0.5, "n_bad": float(K)}), scores)
    board = build(store)
    assert "do not agree on which examples are bad" in board.problems[0]
