"""What can go wrong around a job: each fault is named, costs its own cell, and leaves the rest."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from hydra import compose

from fine_bench.runner import wandb_log
from fine_bench.runner.conclusion import conclude
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job, plan
from fine_bench.store import files as files_module
from fine_bench.store.records import RecordStore

pytestmark = pytest.mark.usefixtures("hydra")

SMALL = (
    "task.n_train=60",
    "task.n_query=10",
    "trainer.max_epochs=1",
    "trainer.batch_size=16",
    "trainer.progress=false",
    "targets=[self]",
    "logger.mode=disabled",
)


def job(folder: Path, *overrides: str) -> Job:
    given = ["estimator=[mean_loss,random]", *SMALL, f"results_dir={folder}", *overrides]
    return plan(check(compose("config", given)))


def run(planned: Job) -> str:
    """Run it; what it said."""
    lines: list[str] = []
    execute(planned.opened(), "sweep", say=lines.append)
    return "\n".join(lines)


def states(folder: Path) -> dict[tuple[str, int], str]:
    return {(r.estimator, r.seed): r.status for r in RecordStore(folder).scan().records}


def whole(folder: Path) -> dict[str, bytes]:
    names = [p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors")]
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in names if "checkpoints" not in p.parts
    }


@pytest.mark.parametrize("nth", [0, 1, 2, 3])
def test_a_disk_that_fills_up_costs_the_cells_that_no_longer_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    nth: int,
) -> None:
    """Full from the ``nth`` file of a record on (scores, record, scores, record), for good."""
    first = job(tmp_path, "seed=0")
    run(first)
    conclude([first], "sweep")
    before = whole(tmp_path)
    second = job(tmp_path, "seed=1")
    write, link, written = files_module._write_whole, files_module._link, 0

    def count(temporary: Path, final: Path) -> None:
        nonlocal written
        link(temporary, final)
        written += final.suffix in (".json", ".safetensors")

    def full(path: Path, data: bytes) -> None:
        if written >= nth and "checkpoints" not in path.parts:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(files_module, "_link", count)
    monkeypatch.setattr(files_module, "_write_whole", full)
    said = run(second)
    assert "No space left on device" in said
    assert "--seed1--" in said
    assert f"could not write {tmp_path}" in said
    fits = nth // 2  # cells whose scores and record both fit
    assert sum(seed == 1 for _, seed in states(tmp_path)) == fits
    assert {k: v for k, v in whole(tmp_path).items() if k in before} == before
    assert not list(tmp_path.rglob("*.tmp"))

    monkeypatch.undo()  # there is room again; the sweep says what is missing, then completes
    assert conclude([first, second], "sweep") == 1
    assert "random/self seed 1 missing" in " ".join(capsys.readouterr().err.split())
    run(second)
    assert conclude([first, second], "sweep") == 0
    assert set(states(tmp_path).values()) == {"finished"}
    assert all(r.revision == 1 for r in RecordStore(tmp_path).scan().records)


def test_a_full_disk_at_the_end_is_a_failure_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fine_bench.runner import sweep

    planned = job(tmp_path, "seed=0")
    run(planned)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files_module, "_write_whole", full)
    swept = sweep.Sweep()
    swept.jobs = [planned]
    swept.folder = tmp_path
    swept.end()
    assert swept.status == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the leaderboard could not be made: could not write" in said
    assert "leaderboard" in said
    assert "No space left on device" in said
    monkeypatch.undo()
    swept.end()
    assert swept.status == 0


@pytest.mark.parametrize("fault", ["truncated", "another version"])
def test_a_damaged_record_is_computed_again_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    planned = job(tmp_path, "seed=0")
    run(planned)
    (path,) = (tmp_path / "records").rglob("random--self--seed0--*.json")
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    damaged, others = path.read_bytes(), whole(tmp_path)
    assert conclude([planned], "sweep") == 1
    said = capsys.readouterr()
    assert path.name in (said.out + said.err).replace("\n", "")
    assert "random/self seed 0 missing" in " ".join(said.err.split())
    run(planned)
    assert conclude([planned], "sweep") == 0
    assert path.read_bytes() == damaged  # nothing stored is altered, not even what is damaged
    after = whole(tmp_path)
    assert {k: after[k] for k in others} == others
    (again,) = [r for r in RecordStore(tmp_path).scan().records if r.estimator == "random"]
    assert again.revision == 2


def test_damaged_scores_are_named_by_the_leaderboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = [job(tmp_path, f"seed={seed}") for seed in (0, 1)]
    for one in planned:
        run(one)
    (path,) = (tmp_path / "scores").rglob("random--self--seed1--*.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    assert conclude(planned, "sweep") == 1  # its consistency is missing
    said = capsys.readouterr()
    text = "".join((said.out + said.err).split())
    assert path.name in text
    assert "damaged" in text
    assert set(states(tmp_path).values()) == {"finished"}
    # the other method's consistency is there all the same
    assert "mean_loss" in (tmp_path / "leaderboard.md").read_text()


def test_a_loss_that_is_no_number_fails_its_seed_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = job(tmp_path, "seed=0"), job(tmp_path, "seed=1", "trainer.lr=1e30")
    run(good)
    run(bad)
    assert conclude([good, bad], "sweep") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "random/self seed 1 failed: training failed: DivergedError: the training loss" in said
    assert "became nan" in said or "became inf" in said
    assert states(tmp_path)["random", 0] == "finished"


class Refusing:
    """W&B whose server is away."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise wandb.errors.CommError("the server is away")


def test_wandb_that_does_not_start_costs_nothing_but_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "init", Refusing())
    planned = job(tmp_path, "seed=0", "logger.mode=online")
    with pytest.warns(UserWarning, match=r"failed to start a run .*the server is away.*disabled"):
        logger = wandb_log.start_run(planned, "sweep")
    assert logger is None
    outcomes = execute(planned, "sweep", logger, say=lambda _: None)
    wandb_log.finish_run(logger, planned, outcomes)
    with pytest.warns(UserWarning, match="failed to log the leaderboard"):
        assert conclude([planned], "sweep") == 0
    assert set(states(tmp_path).values()) == {"finished"}


def test_wandb_that_fails_or_hangs_later_costs_nothing_but_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = job(tmp_path, "seed=0", "logger.mode=offline")
    logger = wandb_log.start_run(planned, "sweep")
    outcomes = execute(planned, "sweep", logger, say=lambda _: None)
    finish = wandb.finish

    def slow(*args: Any, **options: Any) -> None:
        finish(*args, **options)
        raise TimeoutError("the server takes too long")

    monkeypatch.setattr(wandb, "finish", slow)
    monkeypatch.setattr(wandb.Artifact, "add_file", Refusing())
    begun = time.perf_counter()
    with pytest.warns(UserWarning, match="W&B failed to") as warned:
        wandb_log.finish_run(logger, planned, outcomes)
    assert time.perf_counter() - begun < 60
    text = "\n".join(str(w.message) for w in warned)
    assert "failed to log the results (CommError: the server is away)" in text
    assert "failed to close the run (TimeoutError: the server takes too long)" in text
    assert set(states(tmp_path).values()) == {"finished"}


def test_wandb_that_dies_while_a_model_trains_costs_nothing_but_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = job(tmp_path, "seed=0", "logger.mode=offline")
    logger = wandb_log.start_run(planned, "sweep")
    calls = 0

    def dead(*args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        raise BrokenPipeError("the service is gone")

    monkeypatch.setattr(wandb.Run, "log", dead)
    with pytest.warns(UserWarning, match="W&B failed to log while training .*the service is gone"):
        outcomes = execute(planned, "sweep", logger, say=lambda _: None)
    assert calls == 1  # asked once, and then left alone
    assert {o.record.status for o in outcomes} == {"finished"}
    monkeypatch.undo()
    wandb_log.finish_run(logger, planned, outcomes)
    assert conclude([planned], "sweep") == 0


def test_wandb_is_given_a_time_limit(tmp_path: Path) -> None:
    settings = wandb_log._settings(tmp_path)
    assert 0 < settings.init_timeout <= 60
    assert 0 < settings.finish_timeout <= 300
    assert settings.finish_timeout_raises
