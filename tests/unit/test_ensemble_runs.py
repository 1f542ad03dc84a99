"""A method of several runs in the benchmark's runner: which models it is given, and their cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose

from baselines.kfac import KFAC
from baselines.seed_ensemble import SeedEnsemble
from baselines.trak import TRAK
from fine_bench import replay
from fine_bench.runner.backends import images
from fine_bench.runner.backends.backend import ensemble
from fine_bench.runner.cells import problem_of
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job, plan
from fine_bench.store.records import RecordStore

pytestmark = pytest.mark.usefixtures("hydra")

OPTIONS = (
    "estimator=[seed_ensemble,final_loss]",
    "estimators.seed_ensemble.runs=3",
    "task.n_train=60",
    "task.n_query=10",
    "trainer.max_epochs=2",
    "trainer.batch_size=16",
    "trainer.progress=false",
    "trainer.init_seed=5",
    "logger.mode=disabled",
)


def job(folder: Path, *overrides: str) -> Job:
    return plan(check(compose("config", [*OPTIONS, f"results_dir={folder}", *overrides])))


def members(planned: Job) -> list[Any]:
    run = images.stored(planned, pytest.fail)
    assert run is not None
    return [m.checkpoints[-1] for m in ensemble(planned, run, 3, pytest.fail)]


def test_the_runner_trains_the_further_models_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    train = images.train

    def counted(planned: Job, *arguments: Any) -> Any:
        trained.append(planned.config.seed)
        return train(planned, *arguments)

    monkeypatch.setattr(images, "train", counted)
    planned = job(tmp_path, "seed=0")
    assert not [o for o in execute(planned, "s", say=lambda _: None) if o.record.status == "failed"]
    assert len(trained) == len(set(trained)) == 3  # for both targets together
    execute(job(tmp_path, "seed=0", "targets=[queries]"), "s", say=lambda _: None)
    assert len(trained) == 3

    found = members(planned)
    states = [torch.cat([v.flatten() for v in c.params.values()]) for c in found]
    assert all(not torch.equal(states[a], states[b]) for a, b in ((0, 1), (0, 2), (1, 2)))

    store = RecordStore(tmp_path)
    (record,) = [
        r
        for r in store.scan().records
        if r.estimator == "seed_ensemble" and r.target == "validation"
    ]
    problem = problem_of(planned, "validation", images.build_model(planned).net)
    expected = replay(SeedEnsemble(query_weighting="noise"), problem, found)
    assert torch.equal(store.load_scores(record).values, expected.values)
    assert record.cost["seconds"] > record.cost["ensemble_seconds"] > 0
    (other,) = [r for r in store.scan().records if r.estimator == "final_loss" and not r.reason]
    assert "ensemble_seconds" not in other.cost


def test_methods_that_average_over_runs_are_given_theirs(tmp_path: Path) -> None:
    """The last checkpoint of each run for TRAK, all of each for a mean of K-FAC's scores."""
    rows = (
        "estimator=[trak_runs,mean_over_runs]",
        "estimators.trak_runs.runs=3",
        "estimators.trak_runs.dim=8",
        "estimators.mean_over_runs.runs=3",
        "+estimators.mean_over_runs.options.relative_damping=0.5",
        "targets=[queries]",
        "seed=4",
    )
    content = [option for option in OPTIONS if "seed_ensemble" not in option]
    config = compose("config", [*content, *rows, f"results_dir={tmp_path}"])
    planned = plan(check(config))
    outcomes = execute(planned, "s", say=lambda _: None)
    assert [o.record.status for o in outcomes] == ["finished", "finished"]
    run = images.stored(planned, pytest.fail)
    assert run is not None
    runs = ensemble(planned, run, 3, pytest.fail)
    problem = problem_of(planned, "queries", run.model)
    expected = {
        "trak_runs": replay(
            TRAK("factorized", 8, seed=4, runs=3, query_weighting="noise"),
            problem,
            [one.checkpoints[-1] for one in runs],
        ).values,
        "mean_over_runs": torch.stack(
            [replay(KFAC(0.5), problem, one.checkpoints).values for one in runs]
        ).mean(0),
    }
    store = RecordStore(tmp_path)
    for outcome in outcomes:
        record = outcome.record
        values = store.load_scores(record).values
        torch.testing.assert_close(values, expected[record.estimator])
        assert record.cost["seconds"] > record.cost["ensemble_seconds"] > 0


def test_two_run_seeds_share_no_model(tmp_path: Path) -> None:
    both = []
    for seed in (0, 1):
        planned = job(tmp_path, f"seed={seed}")
        execute(planned, "s", say=lambda _: None)
        both += members(planned)
    sums = {sum(float(v.double().sum()) for v in c.params.values()) for c in both}
    assert len(sums) == 6


def test_a_further_run_that_diverges_fails_its_cells_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = job(tmp_path, "seed=0", "targets=[self]")
    train = images.train

    def fails(member: Job, *arguments: Any) -> Any:
        if member.config.seed != 0:
            raise RuntimeError("the training loss became nan")
        return train(member, *arguments)

    monkeypatch.setattr(images, "train", fails)
    states = {
        o.record.estimator: (o.record.status, o.record.reason)
        for o in execute(planned, "s", say=lambda _: None)
    }
    assert states["final_loss"] == ("finished", "")
    status, reason = states["seed_ensemble"]
    assert status == "failed"
    assert "run 2 of 3 of the ensemble (seed" in reason
    assert "RuntimeError: the training loss became nan" in reason


def test_members_timed_by_another_clock_are_told(tmp_path: Path) -> None:
    """They are part of the row's seconds."""
    planned = job(tmp_path, "estimators.seed_ensemble.runs=2", "seed=0")
    ensemble(planned, images.train(planned, [], None), 2, pytest.fail)  # by the wall clock
    by_cpu = replace(planned, config=replace(planned.config, clock="cpu", force=True))
    done = execute(by_cpu, "s", say=lambda _: None)
    clocks = {one.cell.estimator: one.record.training["clock"] for one in done if one.scores}
    assert clocks == {"seed_ensemble": "cpu wall", "final_loss": "cpu"}
