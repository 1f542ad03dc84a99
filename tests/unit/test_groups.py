"""The influence of groups: the sum of single scores, against retraining; its interval; refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from fine_bench import InfluenceScores
from fine_bench.data.backdoor import backdoor
from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.effects import direction_effects
from fine_bench.metrics.groups import (
    between_runs,
    group_influence,
    members_of,
    refuse_overlaps,
    standing,
)
from fine_bench.store.record_json import PENDING
from fine_bench.store.records import RecordStore
from fine_bench.types import RunRecord
from support.benchmarks import loaded

N, D, M, STEPS, LR = 60, 4, 6, 200, 2e-4


def linear_data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    y = x @ torch.linspace(-1.0, 1.0, D, dtype=torch.float64)
    y = y + 0.5 * torch.randn(N, generator=generator, dtype=torch.float64)
    y[:8] = -2.0 * y[:8]
    return x, y, torch.randn(D, generator=generator, dtype=torch.float64)


def trained(kept: torch.Tensor, runs: int, seed: int) -> torch.Tensor:
    """−loss-like observable ⟨q, θ⟩ of ``runs`` linear regressions, batches drawn independently."""
    x, y, q = linear_data()
    generator = torch.Generator().manual_seed(seed)
    theta = torch.zeros(runs, D, dtype=torch.float64)
    for _ in range(STEPS):
        rows = kept[torch.randint(len(kept), (runs, M), generator=generator)]
        residual = torch.einsum("rmd,rd->rm", x[rows], theta) - y[rows]
        theta -= LR * torch.einsum("rm,rmd->rd", residual, x[rows]) / M
    return theta @ q


def single_scores(seed: int = 7) -> InfluenceScores:
    """f-INE of the observable h = −⟨q, θ⟩ (a loss) from one run, every example at every step."""
    x, y, q = linear_data()
    theta = torch.zeros(D, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    accumulator = FineAccumulator(N, 1)
    for _ in range(STEPS * M // N):
        order = torch.randperm(N, generator=generator)
        for rows in torch.split(order, N):
            g = (x[rows] @ theta - y[rows])[:, None] * x[rows]
            accumulator.observe(rows, *direction_effects((g @ -q)[None]), LR)
        for rows in torch.split(order, M):
            theta -= LR * ((x[rows] @ theta - y[rows])[:, None] * x[rows]).mean(0)
    return accumulator.scores("fine", "validation")


def test_the_sum_is_what_retraining_shows() -> None:
    scores = single_scores()
    every, runs = torch.arange(N), 4000
    saw = trained(every, runs, 1)
    for members in (torch.arange(8), torch.arange(20, 26), torch.tensor([3, 30, 31, 40])):
        kept = every[~torch.isin(every, members)]
        without = trained(kept, runs, 2)
        # h is a loss: x is larger when the data lower it, and h = −⟨q, θ⟩
        sd = float(torch.sqrt((saw.var() + without.var()) / 2))
        true = float(saw.mean() - without.mean()) / sd
        # S is replaced by the average of the others, which f-INE compares with the average of all
        expected = group_influence(scores, members).mu * N / (N - len(members))
        noise = (2 / runs) ** 0.5
        assert abs(expected - true) < 4 * noise + 0.1 * abs(true), (expected, true)
    assert abs(group_influence(scores, torch.arange(8)).mu) > 0.3


def test_interval_holds_whatever_the_errors_share() -> None:
    generator = np.random.default_rng(0)
    errors = np.full(5, 0.2)
    covered = {"shared": 0, "independent": 0}
    for _ in range(2000):
        for kind, drawn in (
            ("shared", np.repeat(generator.normal(), 5)),
            ("independent", generator.normal(size=5)),
        ):
            values = torch.zeros(1, 9)
            values[0, :5] = torch.from_numpy(1.0 + errors * drawn)
            scores = InfluenceScores(
                values, "fine", "validation", std_error=torch.full((1, 9), 0.2)
            )
            found = group_influence(scores, torch.arange(5))
            covered[kind] += found.lower <= 5.0 <= found.upper
    assert 0.935 <= covered["shared"] / 2000 <= 0.965
    assert covered["independent"] > 1990


def test_standing_is_that_of_random_groups() -> None:
    generator = np.random.default_rng(1)
    values = generator.exponential(size=40)
    members = np.array([3, 5, 8, 13])
    sums = [values[generator.choice(40, 4, replace=False)].sum() for _ in range(20000)]
    expected = (values[members].sum() - np.mean(sums)) / np.std(sums)
    found = standing(values, members.tolist(), "high")
    assert found.z == pytest.approx(expected, abs=0.03)
    assert found.total == pytest.approx(values[members].sum())
    low = standing(values, members.tolist(), "low")
    assert low.z == pytest.approx(-found.z)
    assert low.median_member == pytest.approx(1 - found.median_member)
    assert standing(np.arange(10.0), [9], "high").median_member == 1.0
    assert standing(np.arange(10.0), [9, 4], "high").least_member == pytest.approx(4 / 9)
    assert np.isnan(standing(np.ones(9), [0, 1], "high").z)


def test_between_runs() -> None:
    found = between_runs([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.upper - 2.0 == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    with pytest.raises(ValueError, match="at least two"):
        between_runs([1.0])


def test_refusals() -> None:
    good = InfluenceScores(torch.zeros(1, 5), "fine", "validation", std_error=torch.ones(1, 5))
    cases = (
        (replace(good, target="self"), [1], 0.95, "observable of its own"),
        (replace(good, std_error=None), [1], 0.95, "no standard errors"),
        (good, [1], 1.0, "strictly between 0 and 1"),
        (good, [], 0.95, "at least one"),
        (good, [1, 1], 0.95, "more than once"),
        (good, [5], 0.95, "there are 5 examples"),
        (good, [0, 1, 2, 3, 4], 0.95, "nothing to compare"),
    )
    for scores, members, level, message in cases:
        with pytest.raises(ValueError, match=message):
            group_influence(scores, members, level)
    rows = replace(good, values=torch.zeros(2, 5), std_error=torch.ones(2, 5))
    with pytest.raises(ValueError, match="one row of all examples"):
        group_influence(rows, [1])
    with pytest.raises(ValueError, match="finite"):
        standing(np.array([1.0, np.nan]), [0], "high")
    assert members_of(torch.tensor([2, 0]), 3).tolist() == [2, 0]
    refuse_overlaps({"a": torch.tensor([0, 1]), "b": [2, 3]}, 5)
    with pytest.raises(ValueError, match="groups 'a' and 'c' overlap in 2 of 3 examples"):
        refuse_overlaps({"a": [0, 1], "b": [2, 3], "c": [0, 1, 4]}, 5)


# ---------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def command() -> ModuleType:
    return loaded("groups")


OPTIONS = {"data": "digits", "seed": 0, "n_train": 300, "n_query": 20, "poison_rate": 0.05}


def test_the_table(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = backdoor(**OPTIONS)  # type: ignore[arg-type]
    store = RecordStore(tmp_path)
    task = {"_target_": "fine_bench.data.backdoor.backdoor", "name": "digits_backdoor", **OPTIONS}
    config = {"task": task, "model": {"_target_": "fine_bench.models.networks.mlp"}, "trainer": {}}
    for seed in (0, 1):
        noise = torch.randn(300, generator=torch.Generator().manual_seed(seed))
        for name, strength in (("fine", 2.0), ("other", 0.0)):
            values = (noise + strength * data.truth.is_bad)[None]
            error = torch.full((1, 300), 0.5) if name == "fine" else None
            scores = InfluenceScores(values, name, "validation", std_error=error)
            record = RunRecord(
                "digits_backdoor", "s" * 8, name, "e" * 8, 1, "validation", seed, "finished",
                scores_sha256=PENDING, data_sha256=data.sha256, config=config,
                suspicious="high",
            )  # fmt: skip
            store.save(record, scores)
    arguments = ["--results", str(tmp_path), "--task", "digits_backdoor"]
    assert command.main(arguments) == 0
    table = pd.read_csv(tmp_path / "groups.csv").set_index(["estimator", "group"])
    assert set(table.loc["fine"].index) == set(data.groups)
    poison = table.loc[("fine", "poison")]
    assert poison["z"] > 5
    assert poison["n_seeds"] == 2
    assert poison["mu_lower"] < poison["mu"] < poison["mu_upper"]
    expected = 1.959964 * 0.5 * poison["size"]
    assert poison["mu_run"] - poison["mu_run_lower"] == pytest.approx(expected, rel=1e-5)
    assert abs(table.loc[("other", "poison")]["z"]) < 3
    assert np.isnan(table.loc[("other", "poison")]["mu"])
    text = (tmp_path / "groups.md").read_text()
    assert "Suspicious end of validation scores: high" in text
    assert f"poison ({int(poison['size'])} examples)" in text
    capsys.readouterr()
    assert command.main(["--results", str(tmp_path), "--task", "absent"]) == 2
    assert "no finished records of absent" in capsys.readouterr().err
