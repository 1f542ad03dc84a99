"""benchmarks/measure_again.py: new numbers of old scores, and nothing else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job
from fine_bench.runner.recorded import cell_of
from fine_bench.store.records import RecordStore, newest
from fine_bench.types import RunRecord
from support.benchmarks import loaded
from support.records import digits_run, make_record


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded("measure_again")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job, RunRecord]:
    """One record with its scores, of which two numbers were forgotten."""
    root = tmp_path_factory.mktemp("results")
    estimator = {"_target_": "baselines.controls.MeanTrainingLoss"}
    config = {**digits_run(), "estimator": estimator, "seed": 0}
    job = cell_of(make_record(estimator="mean_loss", config=config), root)
    (outcome,) = execute(job, "sweep", None, lambda _: None)
    assert outcome.scores is not None
    whole = RecordStore(root).scan().records[0]
    metrics = {k: v for k, v in whole.metrics.items() if k not in ("auroc", "recall_curve_area")}
    shutil.rmtree(root)
    RecordStore(root).save(replace(whole, metrics=metrics), outcome.scores)
    return root, job, whole


def copied(original: tuple[Path, Job, RunRecord], to: Path) -> RecordStore:
    shutil.copytree(original[0], to)
    return RecordStore(to)


def test_a_revision_has_the_same_scores_and_all_numbers(
    script: ModuleType, original: tuple[Path, Job, RunRecord], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store = copied(original, tmp_path / "r")
    whole = original[2]
    arguments = ["x", "--task", whole.task, "--results", str(tmp_path / "r")]
    monkeypatch.setattr("sys.argv", arguments)
    assert script.main() == 0
    assert "mean_loss self seed 0: 2 numbers added" in capsys.readouterr().out
    (found,) = newest(store.scan().records)
    assert found.revision == 2
    assert found.metrics == whole.metrics
    assert (found.cost, found.training) == (whole.cost, whole.training)
    assert found.scores_sha256 == whole.scores_sha256
    assert found.environment["measured_from"] == 1
    assert found.environment["torch"] == whole.environment["torch"]
    assert script.main() == 0  # nothing is left to add
    assert len(store.scan().records) == 2


def test_numbers_that_differ_are_refused(
    script: ModuleType, original: tuple[Path, Job, RunRecord], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store = copied(original, tmp_path / "r")
    (record,) = store.scan().records
    wrong = replace(record, metrics={**record.metrics, "average_precision": 0.123})
    store.save(wrong, store.load_scores(record))
    monkeypatch.setattr("sys.argv", ["x", "--task", record.task, "--results", str(tmp_path / "r")])
    assert script.main() == 1
    assert "refused, 1 numbers differ: average_precision 0.123" in capsys.readouterr().out
    assert len(store.scan().records) == 2
    shutil.rmtree(tmp_path / "r" / "scores")
    assert script.main() == 0
    assert "1 records have no scores here" in capsys.readouterr().out


@pytest.mark.parametrize(("then", "now"), [(True, False), (False, True), (False, False)])
def test_scores_of_uncommitted_code_stay_so(
    script: ModuleType, original: tuple[Path, Job, RunRecord], tmp_path: Path, then: bool, now: bool
) -> None:
    store = copied(original, tmp_path / "r")
    (record,) = store.scan().records
    record = replace(record, environment={**record.environment, "dirty": then})
    script.again(store, record, None, {"commit": "c" * 40, "dirty": now})
    (found,) = newest(store.scan().records)
    assert found.environment["dirty"] is (then or now)
    assert found.environment["measured_commit"] == "c" * 40
