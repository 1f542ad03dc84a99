"""Jobs of a sweep that help each other: each cell once, by whomever, with the same scores."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from fine_bench.runner import sharing
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute, help_with, with_others
from fine_bench.runner.plan import plan
from fine_bench.runner.sharing import Claims, Process
from fine_bench.store import files
from fine_bench.store.records import RecordStore, now
from support.records import digits_run

ROWS = {
    "fine": "fine_bench.callback.FINECallback",
    "tracin": "baselines.tracin.TracIn",
    "mean_loss": "baselines.controls.MeanTrainingLoss",
    "random": "baselines.controls.RandomScores",
}

pytestmark = pytest.mark.skipif(not files.CAN_LOCK, reason="this system does not lock files")


def config(results: Path, seed: int = 0, **more: dict[str, object]) -> DictConfig:
    estimators = {name: {"_target_": target} for name, target in ROWS.items()} | more
    estimators["random"]["seed"] = None  # type: ignore[assignment]
    return OmegaConf.create(
        {
            "seed": seed, **digits_run(num_threads=1), "targets": ["self", "validation"],
            "estimators": estimators, "results_dir": str(results), "allow_packages": ["support"],
        }
    )  # fmt: skip


def sweep_of(folder: Path, jobs: int = 2, at_once: int = 2) -> Path:
    sharing.open_folder(folder / "sweep", jobs, at_once, now())
    return folder / "sweep"


def said(results: Path) -> dict[tuple[str, str], tuple[str, str, int]]:
    found = RecordStore(results).scan().records
    return {(r.estimator, r.target): (r.status, r.scores_sha256, r.revision) for r in found}


def test_a_helper_computes_what_its_own_job_would_have(tmp_path: Path) -> None:
    broken = {"broken": {"_target_": "support.broken_estimators.FailsOnSeedOne", "seed": None}}
    alone, both = tmp_path / "alone", tmp_path / "both"
    execute(plan(check(config(alone, 1, **broken))), "sweep", say=lambda _: None)
    sweep = sweep_of(tmp_path)
    own = Process(sweep, 0, config(both, 1, **broken))
    helper = Process(sweep, 1, config(both, 2))
    job = plan(check(config(both, 1, **broken)))
    ((theirs, claims),) = [pair for _, pair in zip(range(1), helper.to_help(), strict=False)]
    helped = help_with(theirs, claims)
    names = [one.cell.estimator for one in helped]
    assert list(dict.fromkeys(names)) == ["random", "mean_loss", "tracin"]
    written = execute(job, sweep.name, say=lambda _: None, claims=own.claims())
    # what failed in the helper, for want of memory perhaps, is its own job's to say
    assert {one.cell.estimator for one in written} == {"fine", "broken"}
    assert said(both) == said(alone)
    found = with_others(job, written, own.claims())
    assert [one.cell for one in found] == list(job.todo)
    assert all((one.scores is None) == (one.record.status != "finished") for one in found)
    assert help_with(theirs, claims) == []  # nothing is open any more
    # the records of another sweep are none of this one
    assert with_others(job, [], Claims(sweep, 0, "another", "")) == []


def test_an_earlier_sweep_in_the_same_folder_computed_nothing_of_this_one(tmp_path: Path) -> None:
    """As with ``hydra.sweep.dir=…``: ``force=true`` and what failed are computed again."""
    results = tmp_path / "results"
    for _ in range(2):
        sweep = sweep_of(tmp_path)
        job = plan(check(OmegaConf.merge(config(results), {"force": True})))
        own = Process(sweep, 0, config(results))
        assert len(execute(job, sweep.name, say=lambda _: None, claims=own.claims())) == 8
        assert own.claims().leftover(job) == []  # so nobody trains for it
        own.leave()
    revisions = [record.revision for record in RecordStore(results).scan().records]
    assert revisions.count(2) == 8


def test_what_a_killed_sweep_left_is_taken_away(tmp_path: Path) -> None:
    assert Process(sweep_of(tmp_path), 1, config(tmp_path)).leave() is None
    second = Process(sweep_of(tmp_path), 0, config(tmp_path))
    assert second._state(1) == "waiting"
    sweep = sweep_of(tmp_path, jobs=1)
    assert Process.of(sweep, 0, config(tmp_path)) is None


def test_a_helper_does_not_count_what_others_work_on(tmp_path: Path) -> None:
    """It would train for cells that it may not compute."""
    sweep = sweep_of(tmp_path)
    own = Process(sweep, 0, config(tmp_path))
    helper = Claims(own.folder, 0, sweep.name, "", helps=True)
    job = plan(check(config(tmp_path)))
    taken = next(cell for cell in job.todo if cell.estimator == "mean_loss")
    with files.held(helper._path(taken)) as held:
        assert held
        left = helper.leftover(job)
        assert taken not in left
        assert len(left) == 5
    assert [cell.estimator for cell in helper.leftover(job)] == [
        name for name in ("random", "mean_loss", "tracin") for _ in range(2)
    ]


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("CUDA out of memory")])
def test_a_cell_that_fails_in_a_helper_is_its_own_jobs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    """It stayed *failed* until the command was typed again, where one process had had room."""
    sweep = sweep_of(tmp_path)
    own = Process(sweep, 0, config(tmp_path))
    job = plan(check(config(tmp_path)))
    helper = Claims(own.folder, 0, sweep.name, "", helps=True)

    def full(self: object) -> None:
        raise error

    with monkeypatch.context() as patched, caplog.at_level(logging.DEBUG, "fine_bench"):
        patched.setattr("baselines.controls.RandomScores.compute", full)
        helped = help_with(config(tmp_path), helper)
    assert {one.cell.estimator for one in helped} == {"mean_loss", "tracin"}
    assert str(error) in caplog.text
    written = execute(job, sweep.name, say=lambda _: None, claims=own.claims())
    assert {one.cell.estimator for one in written} == {"fine", "random"}
    assert "failed" not in {status for status, _, _ in said(tmp_path).values()}


def test_what_ends_a_helper_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sweep = sweep_of(tmp_path)
    claims = Process(sweep, 0, config(tmp_path)).claims()
    bad = OmegaConf.merge(config(tmp_path), {"targets": ["everything"]})
    with caplog.at_level(logging.DEBUG, "fine_bench"):
        assert help_with(bad, claims) == []
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("DEBUG", "fine_bench.runner.execution")
    assert "gave up helping with seed 0" in caplog.text
    assert "targets=['everything']" in caplog.text  # with its reason


def test_a_cell_that_a_helper_leaves_is_computed_by_its_job(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    own = Process(sweep, 0, config(tmp_path))
    job = plan(check(config(tmp_path)))
    claims = own.claims()
    cell = next(cell for cell in job.todo if cell.estimator == "tracin")
    held = files.held(claims._path(cell))
    assert held.__enter__()
    order: list[str] = []

    def let_go(line: str) -> None:
        order.append(line.split()[0])
        if line.startswith("random") and order.count("random") == 2:
            held.__exit__(None, None, None)

    written = execute(job, sweep.name, say=let_go, claims=claims)
    assert written[-1].cell is cell
    assert len(written) == len(job.todo) == 8


def test_a_helper_whose_training_fails_leaves_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(tmp_path)
    own = Process(sweep, 0, config(tmp_path))
    helper = Process(sweep, 1, config(tmp_path, 1))
    bad = config(tmp_path)
    bad.trainer.lr = 1e30
    for theirs, claims in helper.to_help():
        assert help_with(bad, claims) == []
        assert theirs.seed == 0
    assert said(tmp_path) == {}
    own.leave()


def test_who_is_free_begins_the_next_job(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, jobs=3)
    first, second = (Process(sweep, n, config(tmp_path, n)) for n in (0, 1))
    assert list(first.to_help()) == []  # the third job waits for it
    # the second process does not leave with it: another one is free for the third job
    begun: list[Process] = []
    timer = threading.Timer(0.3, lambda: begun.append(Process(sweep, 2, config(tmp_path, 2))))
    timer.start()
    helped = [(theirs.seed, claims._number) for theirs, claims in second.to_help()]
    assert helped == [(2, 2)]
    begun[0].leave()
    assert list(second.to_help()) == []
    sharing.close_folder(sweep)
    assert list(sweep.iterdir()) == []


def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "PATIENCE", 0.3)
    sweep = sweep_of(tmp_path, jobs=3, at_once=3)
    assert list(Process(sweep, 0, config(tmp_path)).to_help()) == []


@pytest.mark.parametrize(("jobs", "at_once"), [(1, 2), (3, 1)])
def test_nothing_is_shared_where_there_is_nobody_to_share_with(
    tmp_path: Path, jobs: int, at_once: int
) -> None:
    sweep = sweep_of(tmp_path, jobs, at_once)
    assert Process.of(sweep, 0, config(tmp_path)) is None
    assert not sweep.exists()


def test_a_disk_that_refuses_costs_the_help_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(tmp_path)

    def refuses(path: Path, data: bytes) -> None:
        raise files.StoreError(f"could not write {path}")

    monkeypatch.setattr(files, "write_atomic", refuses)
    assert Process.of(sweep, 0, config(tmp_path)) is None
    assert sweep_of(tmp_path / "full").parent.is_dir() is False


def test_a_file_is_held_once(tmp_path: Path) -> None:
    with files.held(tmp_path / "row") as mine:
        assert mine
        with files.held(tmp_path / "row") as other:
            assert not other
    with files.held(tmp_path / "row", wait=True) as again:
        assert again
