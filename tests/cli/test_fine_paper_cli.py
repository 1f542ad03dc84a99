"""The paper's estimator in the runner, beside the all-example one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from fine_bench.store.records import RecordStore
from support.commands import Commands

BOTH = (
    "estimator=[fine,fine_paper]",
    "estimators.fine_paper.sample=40",
    "estimators.fine_paper.every_n_steps=1",
    "logger.mode=disabled",
)


@pytest.fixture(scope="module")
def finished(cli: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("paper") / "results"
    return folder, cli(folder, *BOTH, "seed=0,1")


def test_records_hold_groups_agreement_and_the_auxiliary_run(finished: tuple[Path, Any]) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert "trained the auxiliary run" in done.stderr
    store = RecordStore(folder)
    records = [r for r in store.scan().records if r.estimator == "fine_paper"]
    assert {(r.target, r.seed) for r in records} == {
        (t, s) for t in ("self", "validation") for s in (0, 1)
    }
    for record in records:
        assert record.metrics["n_watched"] == 40
        assert 0 < record.metrics["n_bad"] < 24
        assert "auroc" in record.metrics
        for name in ("random_clean", "near_duplicates"):
            assert 0 < record.metrics[f"group/{name}/p_value"] <= 1
            assert record.metrics[f"group/{name}/size"] >= 1
        assert -1 <= record.metrics["agreement/fine/spearman"] <= 1
        assert record.metrics["agreement/fine/n"] == 40
        cost = record.cost
        assert cost["seconds"] > cost["auxiliary_seconds"] > 0
        assert cost["gradient_evaluations"] == 2 * cost["auxiliary_gradient_evaluations"]
        scores = store.load_scores(record)
        assert scores.watched is not None
        assert len(scores.watched) == 40
        n_traced, n_samples = scores.extras["trace/p"].shape
        assert scores.extras["trace/q"].shape == (n_traced, n_samples)
        assert scores.extras["trace/step"].tolist() == list(range(1, n_samples + 1))
        groups = {int(v) for k, v in record.metrics.items() if k.endswith("/index")}
        traced = scores.extras["trace/subset"].tolist()
        assert {-1 - g for g in groups} == {i for i in traced if i < 0}
    watched = [store.load_scores(r).watched for r in records]
    assert all(w is not None and torch.equal(w, watched[0]) for w in watched)  # type: ignore[arg-type]


def test_the_leaderboard_says_how_many_examples(finished: tuple[Path, Any]) -> None:
    folder, done = finished
    assert "(40 examples)" in " ".join(done.stdout.split())
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    table = pd.read_csv(folder / "leaderboard.csv").set_index(["estimator", "target", "metric"])
    row = table.loc[("fine_paper", "self", "consistency_jaccard")]
    assert str(row["watched"]) == "40"
    assert row["n"] == 2


def test_adding_the_paper_later_changes_nothing_else(
    cli: Commands, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    """Watching does not change the run, and an earlier record of f-INE is compared with."""
    first = cli(tmp_path, "estimator=[fine]", "seed=0", "logger.mode=disabled")
    assert first.returncode == 0, first.stderr
    done = cli(tmp_path, *BOTH, "seed=0")
    assert done.returncode == 0, done.stderr
    theirs = {
        (r.estimator, r.target): r for r in RecordStore(finished[0]).scan().records if r.seed == 0
    }
    mine = {(r.estimator, r.target): r for r in RecordStore(tmp_path).scan().records}
    assert mine.keys() == theirs.keys()
    for key, record in mine.items():
        assert record.scores_sha256 == theirs[key].scores_sha256
        assert record.metrics == pytest.approx(dict(theirs[key].metrics), nan_ok=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("estimators.fine_paper.sample=500", "sample=500, but the training set has 120 examples"),
        ("+estimators.fine_paper.subsets={mine:[3,120]}", "from 3 to 120, but the training set"),
        ("estimators.fine_paper.auxiliary=without_subset", "one more training for every subset"),
        ("estimators.fine_paper.members=17", "members=17 must lie between 1 and the batch size"),
    ],
)
def test_the_impossible_is_refused_before_training(
    cli: Commands, tmp_path: Path, override: str, message: str
) -> None:
    done = cli(tmp_path, *BOTH, override, "seed=0")
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "records").exists()


def test_a_target_that_it_does_not_serve_is_skipped_with_the_reason(
    cli: Commands, tmp_path: Path
) -> None:
    done = cli(tmp_path, *BOTH, "targets=[validation_per_class]", "seed=0")
    assert done.returncode == 0, done.stderr
    states = {r.estimator: (r.status, r.reason) for r in RecordStore(tmp_path).scan().records}
    assert states["fine"][0] == "finished"
    assert states["fine_paper"][0] == "skipped"
    assert 'serves "self" and "validation"' in states["fine_paper"][1]
