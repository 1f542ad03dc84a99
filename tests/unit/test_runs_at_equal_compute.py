"""benchmarks/runs_at_equal_compute.py: groups of runs, their intervals, the tables from files."""

from __future__ import annotations

import argparse
import math
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy import stats

from fine_bench.retraining.truth import Truth
from fine_bench.retraining.truth_files import folders, named
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores
from support.benchmarks import BENCHMARKS, loaded
from support.records import make_record

SEEDS = 6


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which imports others."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return loaded("runs_at_equal_compute")


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return loaded("run_groups")


def world(n: int, noise: float, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predictions ``(n, q, subsets)`` of n runs, and the margins ``(subsets, q)``."""
    rng = np.random.default_rng(seed)
    margin = rng.standard_normal((20, 8))
    return margin.T + noise * rng.standard_normal((n, 8, 20)), margin


def test_groups_are_their_loop(script: ModuleType, groups: ModuleType) -> None:
    each, margin = world(SEEDS, 2.0)
    for size in (1, 2, 3, 5, 6):
        found = groups.measured(script.mean_of(each), SEEDS, size, margin)
        by_group = {
            group: np.mean(
                [
                    stats.spearmanr(np.mean([each[i][q] for i in group], 0), margin[:, q]).statistic
                    for q in range(8)
                ]
            )
            for group in combinations(range(SEEDS), size)
        }
        assert found.lds == pytest.approx(np.mean([*by_group.values()]))
        if size > 3:
            assert np.isnan(found.without).all()
            continue
        for i in range(SEEDS):
            left = [value for group, value in by_group.items() if i not in group]
            assert found.without[i] == pytest.approx(np.mean(left))


def test_the_interval_of_single_runs_is_students(script: ModuleType, groups: ModuleType) -> None:
    each, margin = world(SEEDS, 2.0)
    found = groups.measured(script.mean_of(each), SEEDS, 1, margin)
    alone = [
        np.mean([stats.spearmanr(run[q], margin[:, q]).statistic for q in range(8)]) for run in each
    ]
    expected = stats.t.interval(0.95, SEEDS - 1, np.mean(alone), stats.sem(alone))
    assert groups.jackknife(found.lds, found.without) == pytest.approx(expected)
    assert all(map(math.isnan, groups.jackknife(0.5, np.full(4, np.nan))))


def test_the_interval_of_groups_has_the_spread_of_other_runs(
    script: ModuleType, groups: ModuleType
) -> None:
    """Half of its width against the deviation over many worlds with the same margins."""
    margin = world(1, 1.0)[1]
    rng = np.random.default_rng(1)
    values, halves = [], []
    for _ in range(60):
        each = margin.T + 3.0 * rng.standard_normal((8, 8, 20))
        found = groups.measured(script.mean_of(each), 8, 2, margin)
        low, high = groups.jackknife(found.lds, found.without)
        values.append(found.lds)
        halves.append((high - low) / 2 / stats.t.ppf(0.975, 7))
    assert np.mean(halves) == pytest.approx(np.std(values, ddof=1), rel=0.25)


def test_many_groups_are_drawn(groups: ModuleType) -> None:
    drawn = groups.groups_of(20, 5)
    assert 250 < len(drawn) <= groups.MOST_GROUPS
    assert drawn == groups.groups_of(20, 5)
    assert all(len(set(group)) == 5 for group in drawn)
    assert groups.groups_of(4, 2) == [*combinations(range(4), 2)]


def test_runs_within_a_budget(groups: ModuleType) -> None:
    within = groups.runs_within
    assert [within(5, cost, 9) for cost in (0.5, 1.0, 1.25, 1.3, 5.0, 8.0)] == [9, 5, 4, 3, 1, 1]
    assert within(3, 1.0000000000000002, 9) == 3


def test_a_difference_is_paired(script: ModuleType, groups: ModuleType) -> None:
    """Methods that share what differs between the runs differ surely, whatever the runs."""
    each, margin = world(8, 3.0)
    shift = np.random.default_rng(2).standard_normal((8, 1, 1))
    each = each + 3.0 * shift * np.random.default_rng(3).standard_normal((1, 8, 20))
    better = script.mean_of(each + 0.5 * margin.T)
    rows = [
        groups.Row("other", tuple(range(8)), script.mean_of(each), 1.5),
        groups.Row("best", tuple(range(8)), better, 1.0),
    ]
    frame = groups.curves(rows, margin)
    assert set(frame[frame.method == "other"].runs) == {1, 2, 3, 5, 6, 8}
    assert frame.trainings.max() == 12.0
    one = groups.differences(rows, {"best": 2, "other": 2}, margin).iloc[0]
    assert (one.best, one.other) == ("best", "other")
    alone = frame[(frame.runs == 2)].set_index("method")
    assert one.difference == pytest.approx(alone.lds["best"] - alone.lds["other"])
    assert 0 < one.lower < one.difference < one.upper
    assert one.upper - one.lower < 0.7 * (alone.upper["best"] - alone.lower["best"])
    assert one.queries_lower < one.difference < one.queries_upper


def save(
    store: RecordStore,
    truth: Truth,
    name: str,
    seed: int,
    values: NDArray[Any],
    clock: str = "cpu",
) -> None:
    record = make_record(
        task=truth.task,
        setting=truth.setting,
        data_sha256=truth.data_sha256,
        estimator=name,
        target="queries",
        seed=seed,
        cost={"seconds": 2.0, "gradient_evaluations": 0.0},
        training={"seconds": 4.0, "clock": clock},
    )
    tensor = torch.from_numpy(values.astype(np.float32))
    store.save(record, InfluenceScores(values=tensor, method=name, target="queries"))


def test_tables_from_files(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = named("mnist_mlp", folders(None))
    assert truth.subsets is not None
    own = truth.subsets.of("published")
    members, margin = truth.subsets.members[own], truth.subsets.margin[own]
    # what least squares makes of the truth: it orders these subsets nearly perfectly
    centred = margin - margin.mean(0)
    right = np.linalg.lstsq(members - 0.5, centred, rcond=None)[0].T
    rng = np.random.default_rng(0)
    store = RecordStore(tmp_path / "results")
    scale = right.std()
    for seed in range(4):
        noise = scale * rng.standard_normal(right.shape)
        save(store, truth, "good", seed, right + noise)
        save(store, truth, "bad", seed, right + 5 * noise)
    save(store, truth, "alone", 0, right)
    work = tmp_path / "terms"
    work.mkdir()
    about = {
        "data_sha256": truth.data_sha256, "setting": truth.setting, "seconds": "1.0",
        "training_seconds": "4.0",
    }  # fmt: skip
    for seed in range(4):
        residual = torch.rand(4000, dtype=torch.float64) + 0.5
        kernel = (torch.from_numpy(right) / residual).contiguous()
        save_file(
            {"kernel": kernel.float(), "residual": residual},
            work / f"seed{seed}.safetensors",
            about,
        )
    places = ["--results", str(tmp_path / "results"), "--work", str(work), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["x", "table", "--least", "4", *places])
    script.main()

    name = "runs_at_equal_compute--mnist_mlp"
    frame = pd.read_csv(tmp_path / f"{name}.csv").set_index(["method", "runs"])
    assert set(frame.index.get_level_values(0)) == {"good", "bad", script.MODELS}
    assert frame.loc[(script.MODELS, 1), "lds"] == pytest.approx(1.0, abs=0.02)
    assert frame.loc[("good", 1), "trainings"] == 1.5
    assert frame.loc[(script.MODELS, 2), "trainings"] == 2.5
    assert frame.loc[("bad", 3), "lds"] > frame.loc[("bad", 1), "lds"]
    page = (tmp_path / f"{name}.md").read_text()
    assert "| good | 4 | 1.50 | 0." in page
    assert "in trainings' time (cpu clock)" in page
    for budget in ("2", "3", "4", "5"):
        assert f"## Within the time of {budget} trainings" in page
    assert f"| {script.MODELS} (1) | good (1) |" in page.split("## Within the time of 1.5")[1]
    assert f"| {script.MODELS} (4) | good (3) | " in page
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr("sys.argv", ["x", "table", "--rows", "alone", *places, "--force"])
    with pytest.raises(SystemExit, match="0 seeds have scores of all of no row, and --least is 6"):
        script.main()
    with pytest.raises(SystemExit, match=r"no finished run of seed 3 below .*seed=3 results_dir="):
        script.terms(
            argparse.Namespace(
                seeds=[3],
                experiment="digits_mislabel",
                results=tmp_path / "results",
                work=tmp_path / "new",
            )
        )
    save(store, truth, "by the wall", 0, right, "wall")
    monkeypatch.setattr("sys.argv", ["x", "table", *places, "--force"])
    with pytest.raises(SystemExit, match=r"different clocks .*wall: by the wall.*clock=cpu"):
        script.main()
    monkeypatch.setattr("sys.argv", ["x", "table", "--experiment", "mnist_atypical", *places])
    with pytest.raises(SystemExit, match="no subsets with several seeds, so there is no LDS"):
        script.main()
