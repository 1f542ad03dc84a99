"""Ctrl-C and SIGTERM in the main command: what is finished is kept, the leaderboard is made."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fine_bench.callback import FINECallback
from fine_bench.runner import interruption
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job, plan
from fine_bench.store.records import RecordStore
from support.commands import Commands
from support.records import digits_run


@pytest.fixture
def watched(tmp_path: Path) -> Job:
    """A run with the callback, whose hooks the tests replace."""
    fine = {"_target_": "fine_bench.callback.FINECallback"}
    config = {
        "seed": 0, **digits_run(num_threads=1), "targets": ["self"],
        "estimators": {"fine": fine}, "results_dir": str(tmp_path),
    }  # fmt: skip
    return plan(check(OmegaConf.create(config)))


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")],
)
def test_what_is_finished_is_kept(
    cli: Commands, tmp_path: Path, number: signal.Signals, status: int, word: str
) -> None:
    options = ["logger.mode=disabled", "estimator=[fine,random]", "targets=[self]"]
    slow = [f"results_dir={tmp_path}", "task.n_train=120", "task.n_query=20",
            "trainer.batch_size=16", "trainer.num_threads=1", "trainer.max_epochs=40"]  # fmt: skip
    process = cli.start("fine_bench", *slow, *options, "seed=0,1,2")
    end = time.monotonic() + 120
    checkpoints = tmp_path / "checkpoints"
    # the second seed is being trained
    while not (list(checkpoints.rglob("seed1-*.tmp-*/*.ckpt"))):
        assert process.poll() is None, process.texts()
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == status, process.texts()
    printed, said = process.texts()
    assert f"interrupted by {word}: what is finished is kept" in said
    assert "computes what is missing" in said
    assert "Traceback" not in said + printed
    records = RecordStore(tmp_path).scan().records
    assert {(r.seed, r.status) for r in records} == {(0, "finished")}
    assert (tmp_path / "leaderboard.md").is_file()
    assert "missing" in said
    assert not list(checkpoints.rglob("*.tmp-*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, interruption.Terminated])
def test_an_interrupted_training_is_no_failed_one(
    watched: Job, monkeypatch: pytest.MonkeyPatch, error: type[KeyboardInterrupt]
) -> None:
    def stops(self: FINECallback, *_: object) -> None:
        raise error

    monkeypatch.setattr(FINECallback, "on_train_epoch_start", stops)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        execute(watched, "test", say=lambda _: None)
    assert RecordStore(watched.results).scan().records == []
    assert signal.getsignal(signal.SIGINT) is before


def test_the_signal_is_raised_and_its_handler_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def asked() -> None:
        with interruption.caught():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(interruption.Terminated):
        asked()
    assert signal.getsignal(signal.SIGTERM) is before
    assert interruption.status_of(interruption.Terminated()) == 143
    assert interruption.status_of(KeyboardInterrupt()) == 130
    assert interruption.of(SystemExit(1)) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_gets_lost_is_raised_again() -> None:
    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with interruption.caught():
        interruption.raise_lost()
        Finalised()  # Python ignores what is raised in a finaliser
        with pytest.raises(interruption.Terminated):
            interruption.raise_lost()
    interruption.raise_lost()  # it was the signal of that command


def test_a_sweep_whose_signal_got_lost_does_not_end_well(cli: Commands, tmp_path: Path) -> None:
    """It ended with 0 although cells were missing."""
    done = cli(
        tmp_path, "logger.mode=disabled", "targets=[self]", "seed=0,1", "estimator=[random]",
        "+estimators.loses._target_=support.broken_estimators.LosesSignal",
        "+estimators.loses.seed=null", "+estimators.last._target_=baselines.controls.RandomScores",
        "+estimators.last.seed=null", "allow_packages=[support]",
    )  # fmt: skip
    assert done.returncode == 143, done.stderr
    assert "interrupted by SIGTERM: what is finished is kept" in done.stderr
    records = RecordStore(tmp_path).scan().records
    assert {(r.estimator, r.seed) for r in records} == {("random", 0), ("loses", 0)}
    assert "missing" in done.stderr


def test_sigterm_in_a_process_that_does_not_listen_is_no_failed_training(
    watched: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a launcher's job Lightning alone hears it, and ends the fit by an exception of its own."""

    def stops(self: FINECallback, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FINECallback, "on_train_epoch_start", stops)
    with pytest.raises(interruption.Terminated):
        execute(watched, "test", say=lambda _: None)
    assert RecordStore(watched.results).scan().records == []
