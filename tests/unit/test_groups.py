"""The influence of groups: the sum of single scores, against retraining; its interval; refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fine_bench import InfluenceScores, watch
from fine_bench.data.backdoor import backdoor
from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.effects import direction_effects
from fine_bench.fine.options import Options
from fine_bench.fine.snapshot_accumulator import SnapshotAccumulator, SnapshotInterval
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


# ------------------------------------------------------------------- errors measured over epochs


def parts_of(epochs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """z of the docstring in plain loops, from u and v of each epoch, ``(k, n)``."""
    u, v = (torch.stack(kind) for kind in zip(*epochs, strict=True))
    n = u.shape[1]
    z = torch.zeros_like(u)
    for i in range(n):
        total = v[:, i].sum()
        mu = u[:, i].sum() / (n * total).sqrt()
        for b in range(len(u)):
            z[b, i] = u[b, i] / (n * total).sqrt() - mu * v[b, i] / (2 * total)
    return z


def epochs_of(n: int, k: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, generator=generator, dtype=torch.float64),
            0.5 + torch.rand(n, generator=generator, dtype=torch.float64),
        )
        for _ in range(k)
    ]


def observed(
    epochs: list[tuple[torch.Tensor, torch.Tensor]], together: bool, size: int = 4
) -> FineAccumulator:
    """The same epochs in batches, one by one or several steps at once."""
    n = len(epochs[0][0])
    accumulator = FineAccumulator(n, 1, group_errors=True)
    index, effect, sigma = [], [], []
    for number, (u, v) in enumerate(epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(number))
        for rows in order.split(size):
            index.append(rows)
            effect.append(u[rows][None])
            sigma.append(v[rows].sqrt()[None])
    one = torch.ones(len(index), dtype=torch.float64)
    if together:  # a queue that does not end with the epoch
        accumulator.observe_steps(torch.stack(index), torch.stack(effect), torch.stack(sigma), one)
    else:
        for rows, e, s in zip(index, effect, sigma, strict=True):
            accumulator.observe(rows, e, s, 1.0)
    return accumulator


@pytest.mark.parametrize("together", [False, True])
def test_parts_are_those_of_the_epochs(together: bool) -> None:
    epochs = epochs_of(12, 5)
    scores = observed(epochs, together).scores("fine", "validation", inflation=1.5)
    z = 1.5 * parts_of(epochs)
    torch.testing.assert_close(scores.extras["group_parts"][:, 0].double(), z, rtol=1e-5, atol=1e-6)
    members = [1, 4, 7]
    found = group_influence(scores, members)
    whole = z[:, members].sum(1)
    assert found.measured
    assert found.std_error == pytest.approx(float(whole.std() * 5**0.5), rel=1e-5)
    # a group of one has the example's own error, and copies of an example are their sum
    assert group_influence(scores, [3]).std_error == pytest.approx(
        float(scores.std_error[0, 3]),
        rel=1e-5,  # type: ignore[index]
    )
    assert group_influence(scores, [3]).correlation is None
    single = scores.std_error[0, members].double()  # type: ignore[index]
    covariance = found.correlation * (single.sum() ** 2 - (single**2).sum())  # type: ignore[operator]
    assert float(covariance + (single**2).sum()) == pytest.approx(found.std_error**2, rel=1e-4)


def test_copies_err_together_and_opposites_cancel() -> None:
    epochs = [(torch.cat([u, u, -u]), torch.cat([v, v, v])) for u, v in epochs_of(4, 6, seed=1)]
    scores = observed(epochs, together=False).scores("fine", "validation")
    copies = group_influence(scores, [0, 4])
    bound = float(scores.std_error[0, [0, 4]].sum())  # type: ignore[index]
    assert copies.std_error == pytest.approx(bound, rel=1e-5)
    assert copies.correlation == pytest.approx(1.0, abs=1e-4)
    assert group_influence(scores, [0, 8]).std_error < 1e-4 * bound


def test_parts_of_snapshots_and_of_a_run_that_goes_on() -> None:
    epochs = epochs_of(8, 4, seed=2)
    interval = SnapshotInterval()
    interval.add(1.0, 8)
    every = torch.arange(8)

    def fresh() -> SnapshotAccumulator:
        return SnapshotAccumulator(8, 1, group_errors=True)

    def watched(accumulator: SnapshotAccumulator, first: int, last: int) -> SnapshotAccumulator:
        for number in range(first, last):
            u, v = epochs[number]
            accumulator.observe_snapshot(
                every, u[None], v.sqrt()[None], interval, epoch=number // 2
            )
        return accumulator

    scores = watched(fresh(), 0, 4).scores("fine", "validation", inflation=1.0)
    # an interval of one step with the whole set adds u and v as they are; two snapshots an epoch
    pairs = [tuple(epochs[i][k] + epochs[i + 1][k] for k in (0, 1)) for i in (0, 2)]
    torch.testing.assert_close(
        scores.extras["group_parts"][:, 0].double(),
        parts_of(pairs),
        rtol=1e-5,
        atol=1e-6,  # type: ignore[arg-type]
    )
    resumed = fresh()
    resumed.load_state_dict(watched(fresh(), 0, 3).state_dict())
    again = watched(resumed, 3, 4).scores("fine", "validation", inflation=1.0)
    assert torch.equal(again.extras["group_parts"], scores.extras["group_parts"])
    in_batch = FineAccumulator(12, 1, group_errors=True)
    in_batch.load_state_dict(observed(epochs_of(12, 5), together=False).state_dict())
    assert len(in_batch.scores("fine", "validation").extras["group_parts"]) == 5


def test_what_has_no_parts_keeps_the_bound() -> None:
    accumulator = observed(epochs_of(12, 5), together=False)
    accumulator.with_replacement = True
    scores = accumulator.scores("fine", "validation")
    found = group_influence(scores, [0, 1])
    assert not found.measured
    assert found.correlation is None
    assert found.std_error == pytest.approx(float(scores.std_error[0, :2].sum()))  # type: ignore[index]
    once = observed(epochs_of(12, 1), together=False).scores("fine", "validation")
    assert not group_influence(once, [0, 1]).measured
    assert "group_parts" not in FineAccumulator(4, 1).scores("fine", "validation").extras


def test_options_that_have_no_group_errors() -> None:
    queries = torch.utils.data.TensorDataset(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    cases: tuple[tuple[dict[str, object], str], ...] = (
        ({"target": "self"}, "observables of their own"),
        ({"target": "validation", "queries": queries, "composition": "standardised"}, "no parts"),
        ({"target": "validation", "queries": queries, "observe_every": 2}, "different epochs"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            Options(group_errors=True, **options)  # type: ignore[arg-type]


def test_group_errors_of_a_run_cover_the_other_runs() -> None:
    """Members that share a factor drawn anew in each epoch, as a class does."""
    generator = torch.Generator().manual_seed(3)
    k, n, runs = 10, 60, 300
    covered = {"measured": 0, "independent": 0}
    for _ in range(runs):
        shared = torch.randn(k, generator=generator, dtype=torch.float64)
        own = torch.randn(k, n, generator=generator, dtype=torch.float64)
        u = 0.3 + 0.6 * shared[:, None] + own
        epochs = [(row, torch.ones(n, dtype=torch.float64)) for row in u]
        scores = observed(epochs, True, size=n).scores("fine", "validation", inflation=1.0)
        found = group_influence(scores, torch.arange(30))
        true = 30 * k * 0.3 / (n * k) ** 0.5
        covered["measured"] += found.lower <= true <= found.upper
        independent = float(scores.std_error[0, :30].square().sum().sqrt())  # type: ignore[index]
        covered["independent"] += abs(found.mu - true) <= 1.96 * independent
    assert 0.88 <= covered["measured"] / runs <= 0.97  # normal quantile with ten epochs
    assert covered["independent"] / runs < 0.6


def test_the_callback_keeps_parts_on_request() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, generator=generator)
    y = torch.randint(0, 2, (24,), generator=generator)
    queries = torch.utils.data.TensorDataset(x[:6], y[:6])
    for schedule in ("in_batch", "snapshot"):
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y, torch.arange(24)), batch_size=6, shuffle=True
        )
        options: dict[str, Any] = {"target": "validation", "queries": queries, "schedule": schedule}
        train = torch.utils.data.TensorDataset(x, y)
        with watch(
            model, optimizer=optimizer, train_set=train, group_errors=True, **options
        ) as fine:
            for _ in range(3):
                for bx, by, index in loader:
                    fine.batch(index)
                    optimizer.zero_grad()
                    fine.loss(torch.nn.functional.cross_entropy(model(bx), by)).backward()
                    optimizer.step()
                fine.epoch_ends()
        found = fine.scores()
        assert found.extras["group_parts"].shape == (3, 1, 24)
        single = group_influence(found, [5]).std_error
        assert single == pytest.approx(float(found.std_error[0, 5]), rel=1e-4)  # type: ignore[index]
