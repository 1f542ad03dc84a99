"""The error rate: against its formula, against its theorem, and where it must break."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from math import isnan, sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from fine_bench.data.digits import digits_mislabel
from fine_bench.metrics.error_rate import (
    NOISY_SHARE,
    agreement_of_flags,
    draw_trusted,
    evaluate,
    flag,
    least_discoveries,
    repeated,
    trusted_mask,
)
from fine_bench.store.record_json import PENDING
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores, RunRecord
from support.benchmarks import loaded


def slow_flags(
    scores: Sequence[float], trusted: Sequence[int], level: Fraction
) -> tuple[dict[int, Fraction], set[int]]:
    """p-values and flags straight from the formulas, in exact arithmetic."""
    n = len(trusted)
    others = [i for i in range(len(scores)) if i not in set(trusted)]
    p = {i: Fraction(1 + sum(scores[t] >= scores[i] for t in trusted), n + 1) for i in others}
    ranked = sorted(p.values())
    m = len(ranked)
    cuts = [value for j, value in enumerate(ranked, 1) if value <= level * j / m]
    return p, {i for i in others if cuts and p[i] <= max(cuts)}


@pytest.mark.parametrize("level", [Fraction(1, 4), Fraction(1, 10)])
@pytest.mark.parametrize("end", ["high", "low"])
def test_flags_are_the_formula(level: Fraction, end: Any) -> None:
    rng = np.random.default_rng(3)
    for n_bad in (0, 3, 12):
        # rounded, so that there are ties with trusted scores too
        scores = np.round(np.r_[rng.normal(size=40), rng.normal(2.5, 1.0, size=n_bad)], 1)
        trusted = rng.choice(40, 19, replace=False)
        found = flag(scores if end == "high" else -scores, trusted, float(level), end)
        p, flagged = slow_flags(scores.tolist(), trusted.tolist(), level)
        assert set(np.flatnonzero(found.flagged)) == flagged
        assert np.isnan(found.p_values[trusted]).all()
        assert np.isnan(found.adjusted[trusted]).all()
        for i, value in p.items():
            assert found.p_values[i] == pytest.approx(float(value))
        assert (found.n_trusted, found.n_tested) == (19, 21 + n_bad)
        others = np.setdiff1d(np.arange(len(scores)), trusted)
        assert ((found.adjusted[others] <= float(level)) == found.flagged[others]).all()


@pytest.mark.parametrize(
    ("n", "n_good", "n_bad", "level"),
    [(7, 3, 1, 0.5), (9, 3, 2, 0.5), (7, 5, 3, 0.25), (9, 4, 4, 0.3), (3, 4, 4, 0.5)],
)
def test_the_rate_is_that_of_the_theorem(n: int, n_good: int, n_bad: int, level: float) -> None:
    """Over *all* trusted sets the mean is at most level·m_good/m, and exactly that when
    level·(n + 1)/m is whole (Mary and Roquain 2022); scores held fixed."""
    rng = np.random.default_rng(n)
    good, bad = rng.normal(size=n + n_good), rng.normal(1.0, 1.0, size=n_bad)
    scores = np.r_[good, bad]
    is_bad = np.arange(len(scores)) >= len(good)
    shares = [
        evaluate(flag(scores, np.array(trusted), level), is_bad).false_share
        for trusted in combinations(range(len(good)), n)
    ]
    m = n_good + n_bad
    promised = level * n_good / m
    assert np.mean(shares) <= promised + 1e-12
    if (level * (n + 1) / m).is_integer():
        assert np.mean(shares) == pytest.approx(promised)
    assert np.mean(shares) > 0.0


def test_the_fewest_discoveries() -> None:
    scores = np.r_[np.arange(19.0), np.zeros(30)]  # 19 trusted, so no p-value is below 1/20
    k = least_discoveries(19, 30, 0.25)
    assert k == 6  # 1/20 <= 0.25 · 6/30
    for high, expected in ((k, k), (k - 1, 0)):
        trial = scores.copy()
        trial[19 : 19 + high] = 100.0
        found = flag(trial, np.arange(19), 0.25)
        assert found.n_flagged == expected
        assert found.least == k
    assert least_discoveries(1000, 3, 0.5) == 1


def test_evaluate_by_hand() -> None:
    scores = torch.tensor([[0.0] * 20 + [5.0, 5.0, 5.0, 0.0, 5.0]])
    is_bad = torch.tensor([True] + [False] * 19 + [True, True, False, True, False])
    found = evaluate(flag(scores, torch.arange(19), 0.2), is_bad)
    # position 0 is bad but trusted; of the untrusted, 20, 21 and 23 are bad
    assert (found.n_flagged, found.false_share) == (4, 0.5)
    assert found.power == pytest.approx(2 / 3)
    nothing = evaluate(flag(torch.ones(1, 25), torch.arange(19), 0.2), torch.zeros(25) > 0)
    assert (nothing.n_flagged, nothing.false_share) == (0, 0.0)
    assert isnan(nothing.power)


def test_agreement_of_flags() -> None:
    a = np.array([True, True, False, False])
    assert agreement_of_flags(a, np.array([False, True, True, False])) == pytest.approx(1 / 3)
    assert isnan(agreement_of_flags(a & False, a & False))


# ----------------------------------------------------------------------------- repeated draws


def planted(seed: int, n: int = 1500, shift: float = 2.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    is_bad = np.arange(n) < n // 5
    return rng.normal(size=n) + shift * is_bad, is_bad


def test_the_rate_holds_over_random_draws_and_not_over_easy_ones() -> None:
    scores, is_bad = planted(0)
    runs = {0: scores, 1: scores + 0.3 * planted(1, shift=0.0)[0]}
    options: dict[str, Any] = {"n_trusted": 150, "levels": (0.1, 0.2), "n_draws": 40}
    held = repeated(runs, is_bad, **options)
    for rate in held:
        assert not rate.exceeded
        assert rate.false_share.mean < rate.level
        # not by flagging nothing: the promise is nearly used up, 1050 of 1350 being good
        assert rate.false_share.mean > 0.5 * rate.level
        assert rate.power > 0.3
        assert 0.5 < rate.jaccard < 1.0
        assert (rate.n_tested, rate.n_draws, rate.n_seeds) == (1350, 40, 2)
    assert repeated(runs, is_bad, **options) == held
    for rate in repeated(runs, is_bad, **options, choice="easy"):
        assert rate.exceeded
    noisy = repeated(runs, is_bad, **options, choice="noisy")
    assert [r.exceeded for r in noisy] == [False, False]
    assert noisy[0].power < held[0].power


@pytest.mark.parametrize("choice", ["random", "noisy"])
def test_the_interval_is_students_over_draws(choice: Any) -> None:
    scores, is_bad = planted(0)
    runs = {4: scores, 9: -scores}
    (rate,) = repeated(runs, is_bad, n_trusted=100, levels=[0.2], n_draws=25, seed=5, choice=choice)
    from fine_bench.seeds import derive

    rng = np.random.default_rng(derive(5, f"error rate/{choice}"))
    draws, flagged, power = [], [], []
    for _ in range(25):
        mask = draw_trusted(is_bad, 100, rng, choice)
        both = [evaluate(flag(run, mask, 0.2), is_bad) for run in runs.values()]
        draws.append(np.mean([r.false_share for r in both]))
        flagged += [r.n_flagged for r in both]
        power += [r.power for r in both]
    expected = stats.t.interval(0.95, 24, np.mean(draws), np.std(draws, ddof=1) / sqrt(25))
    assert (rate.false_share.lower, rate.false_share.upper) == pytest.approx(expected)
    assert rate.false_share.mean == pytest.approx(np.mean(draws))
    assert rate.flagged == pytest.approx(np.mean(flagged))
    assert rate.power == pytest.approx(np.mean(power))


def test_lowest_scores_are_flagged_where_low_is_suspicious() -> None:
    scores, is_bad = planted(0)
    high = repeated({0: scores}, is_bad, n_trusted=150, end="high")
    low = repeated({0: np.stack([-scores, -scores])}, is_bad, n_trusted=150, end="low")
    assert [r.power for r in high] == [r.power for r in low]
    assert high[1].power > 0.1
    assert isnan(high[0].jaccard)  # one run


def test_how_trusted_examples_are_drawn() -> None:
    scores, is_bad = planted(0, n=500)
    rng = np.random.default_rng(0)
    for choice in ("random", "easy", "noisy"):
        mask = draw_trusted(is_bad, 120, rng, choice, scores)
        assert mask.sum() == 120
        assert (mask & is_bad).sum() == (round(120 * NOISY_SHARE) if choice == "noisy" else 0)
    easy = draw_trusted(is_bad, 120, rng, "easy", scores)
    assert scores[easy].max() <= np.median(scores[~is_bad])
    every = sum(draw_trusted(is_bad, 120, rng).astype(int) for _ in range(100))
    # 30 % of the good ones each time
    assert every[is_bad].sum() == 0
    assert abs(every[~is_bad].mean() - 30) < 1e-9
    assert every[~is_bad].min() > 10


@pytest.mark.parametrize(
    ("trusted", "message"),
    [
        (np.array([], dtype=int), "no example is trusted; verify a few hundred"),
        (np.arange(30), "nothing left to flag"),
        (np.array([0, 0, 1]), "position 0 more than once"),
        (np.array([0, 30]), "from 0 to 30, but there are 30"),
        (np.array([-1, 3]), "from -1 to 3"),
        (np.array([0.5]), "whole-numbered positions, got float64"),
        (np.zeros((2, 2), dtype=int), "of shape \\(2, 2\\)"),
        (np.ones(29, dtype=bool), "29 entries for 30"),
        (np.arange(8), "8 trusted .* At least 9 are needed, and 219 to find a single bad one"),
    ],
)
def test_refused_trusted_sets(trusted: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flag(np.arange(30.0), trusted, 0.1)


def test_other_refusals() -> None:
    scores, is_bad = planted(0, n=100)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"n_draws": 19}, "at least 20, got 19"),
        ({"levels": ()}, "at least one level"),
        ({"n_trusted": 41}, "at most half of them, 40"),
        ({"n_trusted": 5}, "At least 19 are needed"),
        ({"is_bad": is_bad.astype(int)}, "is_bad must be boolean"),
        ({"choice": "nice"}, "choice must be one of"),
        ({"scores_by_seed": {}}, "at least one run"),
        ({"scores_by_seed": {0: scores * np.nan}}, "not finite"),
    ]
    for change, message in cases:
        options = {"scores_by_seed": {0: scores}, "is_bad": is_bad, "n_trusted": 20, **change}
        with pytest.raises(ValueError, match=message):
            repeated(options.pop("scores_by_seed"), options.pop("is_bad"), **options)
    with pytest.raises(ValueError, match="needs suspicions"):
        draw_trusted(is_bad, 20, np.random.default_rng(0), "easy")
    assert trusted_mask(torch.tensor([1]), 3).tolist() == [False, True, False]


# --------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def command() -> ModuleType:
    return loaded("error_rate")


TASK = {
    "_target_": "fine_bench.data.digits.digits_mislabel",
    "name": "digits_mislabel",
    "seed": 0,
    "n_train": 400,
    "noise_rate": 0.2,
    "n_query": 20,
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    data = digits_mislabel(seed=0, n_train=400, n_query=20)
    bad = data.truth.is_bad
    store = RecordStore(tmp_path)
    config = {"task": TASK, "model": {"_target_": "fine_bench.models.networks.mlp"}, "trainer": {}}
    for seed in (0, 1):
        noise = torch.randn(400, generator=torch.Generator().manual_seed(seed))
        # the truth lies beside one score only; for the other the task is built again
        for name, strength, extras in (
            ("good", 3.0, {"truth/is_bad": bad}),
            ("idle", 0.0, {}),
        ):
            scores = InfluenceScores((noise + strength * bad)[None], name, "self", extras=extras)
            record = RunRecord(
                "digits_mislabel", "s" * 8, name, "e" * 8, 1, "self", seed, "finished",
                scores_sha256=PENDING, data_sha256=data.sha256, config=config,
            )  # fmt: skip
            store.save(record, scores)
        few = InfluenceScores(torch.zeros(1, 400), "few", "self", watched=torch.arange(30))
        store.save(replace(record, estimator="few"), few)
    return tmp_path


def test_the_table(command: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--results", str(results), "--trusted", "60", "90", "--levels", "0.1", "0.2"]
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "few, target self: 60 trusted are too many" in shown
    table = pd.read_csv(results / "error_rate.csv")
    # 2 methods × 2 levels × (3 choices at 60 trusted, 1 at 90)
    assert len(table) == 2 * 2 * (3 + 1)
    at = table.set_index(["estimator", "trusted", "n_trusted", "level"])
    good = at.loc[("good", "random", 90, 0.2)]
    assert good["power"] > 0.8
    assert good["false_share"] <= 0.2
    assert good["n_draws"] == 20
    assert good["n_seeds"] == 2
    assert at.loc[("idle", "random", 90, 0.2)]["power"] < 0.05
    text = (results / "error_rate.md").read_text()
    assert "--trusted 60 90 --levels 0.1 0.2`" in text  # the command stands beside its table
    assert "drawn at random from the good ones" in text
    assert "**" in text.split("less suspicious half")[1]  # easy sets break the rate
    before = (results / "error_rate.md").read_bytes()
    assert command.main(arguments) == 0
    assert (results / "error_rate.md").read_bytes() == before


def test_the_table_refuses(
    command: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--results", str(results), "--task", "other"]) == 2
    assert "no finished records of other" in capsys.readouterr().err
    both = ["--results", str(results), "--task", "digits_mislabel", "absent"]
    assert command.main(both) == 2
    assert "no finished records of absent" in capsys.readouterr().err
    assert command.main(["--results", str(results), "--draws", "3", "--trusted", "60"]) == 2
    assert "at least 20" in capsys.readouterr().err
