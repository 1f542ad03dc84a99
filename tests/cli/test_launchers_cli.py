"""Sweeps whose jobs run in processes of their own, for real: what is left is the same.

Each command starts several interpreters; the sweep is the smallest one, two seeds of 120 digits.
"""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path
from types import ModuleType

import pytest

from fine_bench.store.records import RecordStore
from support.commands import Commands

pytestmark = pytest.mark.slow

PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}
OVERRIDES = {
    "joblib": ("hydra.launcher.n_jobs=2",),
    "submitit_local": (),
    "ray": ("hydra.launcher.ray.init.num_cpus=2",),
}
TINY = ("estimator=[fine,random]", "targets=[self]", "seed=0,1")
BROKEN = (
    "+estimators.broken._target_=support.broken_estimators.FailsOnSeedOne",
    "+estimators.broken.seed=null",
    "+estimators.noting._target_=support.broken_estimators.NotesItsParent",
    "+estimators.noting.seed=null",
    "allow_packages=[support]",
)


@pytest.fixture(params=sorted(PLUGINS))
def launcher(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    pytest.importorskip(
        f"hydra_plugins.{PLUGINS[name]}", reason=f"the extra of launcher={name} is not installed"
    )
    return name


def launched(name: str) -> tuple[str, ...]:
    return (f"launcher={name}", *OVERRIDES[name])


@pytest.fixture(scope="module")
def reference(cli: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_process") / "results"
    done = cli(folder, *TINY, *BROKEN)
    assert done.returncode == 1, done.stderr
    return folder


def test_the_results_are_those_of_one_process(
    launcher: str,
    cli: Commands,
    script: ModuleType,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One seed of one method fails; W&B is on, offline."""
    folder, notes = tmp_path / "results", tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setenv("NOTES", str(notes))
    done = cli(folder, *TINY, *BROKEN, *launched(launcher))
    assert script.differences(folder, reference, {}) == [], done.stderr
    assert done.returncode == 1, done.stderr
    assert f"{launcher}: 2 job(s), in processes of their own" in done.stderr
    assert "broken/self seed 1 failed: RuntimeError: the disk is on [fire]" in done.stderr
    assert "seed 1: broken               self        failed" in done.stderr
    # each finished cell is named once, by the command or not at all
    for seed in (0, 1):
        assert done.stderr.count(f"seed {seed}: fine ") == 1
    assert "fine" in done.stdout  # the leaderboard
    assert len({record.sweep for record in RecordStore(folder).scan().records}) == 1
    runs = list(folder.glob("wandb/offline-run-*"))
    assert len(runs) == 3  # one a seed, and the leaderboard
    # the command is a child of this process; its jobs are children of others
    parents = [int(path.read_text()) for path in notes.iterdir()]
    assert len(parents) == 2
    assert os.getpid() not in parents


def test_a_job_whose_process_is_killed_is_missing_and_made_up_for(
    launcher: str, cli: Commands, script: ModuleType, tmp_path: Path
) -> None:
    if launcher == "ray":
        pytest.skip("Ray starts a job again whose process is killed")
    flag = tmp_path / "flag"
    options = (
        "estimator=[random]",
        "targets=[self]",
        "seed=0,1",
        "+estimators.killer._target_=support.broken_estimators.Kills",
        f"+estimators.killer.flag={flag}",
        "+estimators.killer.seed=null",
        "allow_packages=[support]",
        "logger.mode=disabled",
        *launched(launcher),
    )
    folder = tmp_path / "results"
    killed = cli(folder, *options)
    assert killed.returncode == 1, killed.stderr
    assert "the process of a job ended before its work" in killed.stderr
    assert "The same command computes what is missing" in killed.stderr
    assert "Traceback (most recent call last)" not in killed.stderr.split("error:")[-1]
    before = script.state(folder)
    assert "killer/self seed" in killed.stderr
    assert "missing" in killed.stderr
    assert before
    if launcher != "joblib":  # how it goes on has nothing to do with the launcher
        return
    flag.touch()
    again = cli(folder, *options)
    assert again.returncode == 0, again.stderr
    finished = sum(name.startswith("records/") for name in before)
    assert f"{4 - finished} of 4 cells ({finished} finished earlier)" in again.stderr
    records = RecordStore(folder).scan()
    assert sorted((r.estimator, r.seed, r.status) for r in records.records) == [
        (name, seed, "finished") for name in ("killer", "random") for seed in (0, 1)
    ]
    assert records.problems == []
    assert {name: script.state(folder)[name] for name in before} == before


def test_two_commands_at_once_on_one_folder(
    cli: Commands, script: ModuleType, reference: Path, tmp_path: Path
) -> None:
    """The same sweep twice at the same time: nothing is lost, torn or mixed up."""
    folder = tmp_path / "results"
    ended: list[subprocess.CompletedProcess[str]] = []
    threads = [
        threading.Thread(target=lambda: ended.append(cli(folder, *TINY, *BROKEN))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done.returncode for done in ended] == [1, 1], [done.stderr for done in ended]
    scan = RecordStore(folder).scan()
    assert scan.problems == []
    for record in scan.records:
        if record.status == "finished":
            RecordStore(folder).load_scores(record)
    expected = script.records(reference)
    for name, fields in script.records(folder).items():
        first = expected[name.replace("revision 2", "revision 1")]
        same = {**fields, "revision": 1, "scores_file": first["scores_file"]}
        assert same == first, name
    assert {n for n in script.records(folder) if n.endswith("revision 1")} == set(expected)
    assert script.leaderboard(folder) == script.leaderboard(reference)
    left = [p for p in folder.rglob("*") if ".tmp-" in p.name or p.name.endswith(".tmp")]
    assert left == []
