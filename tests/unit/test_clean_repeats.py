"""What ``clean`` says of another run: the promise on simulated runs, and its formula."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.special import softmax

from fine_bench.runner.clean.inputs.recognise import load
from fine_bench.runner.clean.repeats import (
    chance_to_repeat,
    margins,
    repeatable,
    with_repeats,
)
from fine_bench.runner.clean.scoring import Score, n_suspects, ranking, score_of, suspects
from fine_bench.runner.clean.training import Run

N, K, LATER = 1200, 4, 12


def simulated(seed: int, runs: int) -> tuple[np.ndarray, list[Run]]:
    """Labels, a tenth of them wrong, and runs whose logits differ by noise that rows have."""
    rng = np.random.default_rng(seed)
    right = rng.integers(0, K, N)
    y = np.where(rng.uniform(size=N) < 0.1, (right + rng.integers(1, K, N)) % K, right)
    clear = rng.gamma(2.0, 1.0, N)[:, None] * np.eye(K)[right]
    known = clear + 0.5 * rng.normal(size=(N, K))
    noise = rng.gamma(4.0, 0.15, N)[:, None]
    nothing = np.full(N, np.nan)
    return y, [
        Run(p, np.full_like(p, np.nan), nothing, nothing, (), 0)
        for p in (softmax(known + noise * rng.normal(size=(N, K)), axis=1) for _ in range(runs))
    ]


@pytest.mark.parametrize(
    ("n_runs", "score"), [(2, "doubt"), (3, "doubt"), (3, "p_label"), (3, "margin")]
)
def test_of_the_repeatable_at_most_alpha_do_not_repeat(n_runs: int, score: Score) -> None:
    """Twelve seeds with twelve later runs each; the promise is about the mean over them."""
    lost: dict[float, list[float]] = {0.05: [], 0.1: [], 0.2: []}
    kept: dict[float, list[float]] = {level: [] for level in lost}
    every = []
    for seed in range(12):
        y, runs = simulated(seed, n_runs + LATER)
        now, later = runs[:n_runs], runs[n_runs:]
        again = np.mean([suspects(run, y, score) for run in later], axis=0)
        found = np.sum([suspects(run, y, score) for run in now], axis=0)
        chance = chance_to_repeat(now, y, score)
        most = 2 * found > n_runs
        every.append(1 - again[most].mean())
        for level in lost:
            mask = repeatable(chance, found, n_runs, level)
            assert not mask[~most].any()
            kept[level].append(mask.sum() / most.sum())
            lost[level].append(1 - again[mask].mean() if mask.any() else 0.0)
    for level, shares in lost.items():
        error = np.std(shares, ddof=1) / np.sqrt(len(shares))
        assert np.mean(shares) <= level + 2 * error, (level, np.mean(shares), error)
    # without the rule more would be lost, and the rule is of use
    assert np.mean(every) > 0.1
    assert np.mean(kept[0.1]) > 0.3
    assert np.mean(kept[0.05]) < np.mean(kept[0.2])


def test_chances_are_calibrated() -> None:
    y, runs = simulated(20, 3 + 40)
    chance = chance_to_repeat(runs[:3], y, "doubt")
    again = np.mean([suspects(run, y, "doubt") for run in runs[3:]], axis=0)
    edges = [0.0, 0.2, 0.5, 0.8, 1.0 + 1e-9]
    for low, high in pairwise(edges):
        part = (chance >= low) & (chance < high)
        assert part.sum() >= 20
        assert again[part].mean() == pytest.approx(chance[part].mean(), abs=0.1), (low, high)


def test_margins_tell_suspects_from_others() -> None:
    y, runs = simulated(1, 3)
    found = margins(runs[:1], y, "doubt")
    assert ((found.mean >= 0) == suspects(runs[0], y, "doubt")).all()
    assert np.isinf(found.error).all()
    found = margins(runs, y, "doubt")
    row, each = 17, []
    for run in runs:
        values = sorted(score_of(run, y, "doubt").tolist(), reverse=True)
        k = n_suspects(run.probabilities, y)
        each.append(score_of(run, y, "doubt")[row] - (values[k - 1] + values[k]) / 2)
    assert found.mean[row] == pytest.approx(np.mean(each))
    assert found.error[row] == pytest.approx(np.std(each, ddof=1))
    # no suspects, and only such
    sure = Run(
        np.eye(2)[[0, 1, 0, 1]], *(np.full((4, 2), np.nan), *2 * (np.full(4, np.nan),)), (), 0
    )
    assert (margins([sure], np.array([0, 1, 0, 1]), "p_label").mean < 0).all()


def test_one_run_says_nothing_of_another_unless_mu_ranks() -> None:
    y, runs = simulated(2, 1)
    assert np.isnan(chance_to_repeat(runs, y, "doubt")).all()
    rng = np.random.default_rng(0)
    truth, error = rng.normal(size=N), np.full(N, 0.2)
    error[5] = np.inf
    held = rng.uniform(size=(2, N)) < 0.1
    with_mu = [
        Run(runs[0].probabilities, runs[0].own, np.where(h, np.nan, mu),
            np.where(h, np.nan, error), (), 0)
        for h in held
        for mu in (truth + 0.2 * rng.normal(size=N),)
    ]  # fmt: skip
    for count in (1, 2):
        chance = chance_to_repeat(with_mu[:count], y, "mu")
        unseen = held[:count].all(axis=0)
        assert np.isnan(chance[unseen]).all()
        assert np.isnan(chance[5])
        known = ~unseen & (np.arange(N) != 5)
        assert np.isfinite(chance[known]).all()
        threshold = np.sort(truth)[::-1][n_suspects(runs[0].probabilities, y)]
        assert chance[known & (truth > threshold + 1.0)].min() > 0.95
        assert chance[known & (truth < threshold - 1.0)].max() < 0.05


def test_the_columns_stand_in_the_ranking() -> None:
    y, runs = simulated(3, 3)
    items = load((np.random.default_rng(0).normal(size=(N, 2)), y))
    plain = ranking(items, runs, "doubt", None)
    table = with_repeats(plain, items, runs, "doubt", 0.1)
    assert list(table.columns[6:10]) == ["runs_found", "runs", "repeats", "repeatable"]
    assert table.drop(columns=["repeats", "repeatable"]).equals(plain)
    chance = chance_to_repeat(runs, items.y, "doubt")
    assert (table["repeats"].to_numpy() == chance[table["row"].to_numpy()]).all()
    kept = table[table["repeatable"]]
    assert len(kept) > 10
    assert (1 - kept["repeats"]).mean() <= 0.1
    alone = with_repeats(ranking(items, runs[:1], "doubt", None), items, runs[:1], "doubt", 0.1)
    assert alone["repeats"].isna().all()
    assert not alone["repeatable"].any()
