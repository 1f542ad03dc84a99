"""Scoring a file of anybody's scores against a ground truth, and the runner's records beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor

from fine_bench.commands.score import main
from fine_bench.errors import ConfigError
from fine_bench.leaderboard.build import build
from fine_bench.leaderboard.render import to_csv, to_markdown
from fine_bench.metrics.intervals import mean_interval
from fine_bench.retraining.truth import HalfTruth, SubsetTruth, Truth
from fine_bench.retraining.truth_files import save
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job, plan
from fine_bench.runner.schema import config_folder
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores
from support.commands import Commands
from support.records import make_record

N, Q = 60, 8
RNG = np.random.default_rng(0)
MU = RNG.standard_normal(N) + 2.0 * (np.arange(N) < 12)
EFFECTS = RNG.standard_normal((Q, N))


def half(n: int, mu: np.ndarray[Any, Any]) -> HalfTruth:
    arrays = {
        name: mu.astype(np.float32) if name == "mu_margin" else np.zeros(n, np.float32)
        for name in HalfTruth.__dataclass_fields__
        if name.startswith(("mu_", "effect_", "out_"))
    }
    return HalfTruth(**arrays, n_models=50, ceiling=0.9, ceiling_clean=0.8, lds_ceiling=0.7)


def truth_of(
    mu: np.ndarray[Any, Any], effects: np.ndarray[Any, Any], bad: np.ndarray[Any, Any]
) -> Truth:
    members = np.random.default_rng(1).random((24, len(mu))) < 0.5
    margin = (members @ effects.T).astype(np.float32)
    return Truth(
        name="small_world",
        task="small",
        version=3,
        data_sha256="da7a" * 16,
        setting="5e77" * 16,
        keep=0.5,
        is_bad=bad,
        development=half(len(mu), -mu),
        published=half(len(mu), mu),
        subsets=SubsetTruth(members, margin, margin, margin, 5),
    )


TRUTH = truth_of(MU, EFFECTS, np.arange(N) < 12)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    save(TRUTH, tmp_path / "results" / "ground_truth")
    return tmp_path / "results"


def noisy(seed: int) -> Tensor:
    noise = torch.randn(N, generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(MU).float() + noise


def write(path: Path, **tensors: Tensor) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


Score = Callable[..., tuple[int, str, str]]


@pytest.fixture
def score(results: Path, capsys: pytest.CaptureFixture[str]) -> Score:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([*map(str, arguments), "--results", str(results)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_the_command(cli: Commands, results: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.safetensors", self=noisy(0), queries=torch.tensor(EFFECTS))
    arguments = [str(file), "--task", "small_world", "--results", str(results)]
    done = cli.run("fine_bench", "score", *arguments)
    assert done.returncode == 0, done.stderr
    assert "fidelity to retraining" in done.stdout
    assert "ground truth version 3" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_numbers_of_one_file(score: Score, tmp_path: Path) -> None:
    scores = noisy(0)
    file = write(
        tmp_path / "mine.safetensors",
        self=scores[None],
        queries=torch.tensor(EFFECTS),
        validation=-scores,
    )
    status, printed, errors = score(file, "--task", "small_world", "--format", "json")
    assert (status, errors) == (0, "")
    found = json.loads(printed)
    rows = {row["target"]: row for row in found["tables"][0]["rows"]}
    assert [row["estimator"] for row in rows.values()] == ["mine"] * 3
    own = rows["self"]["stats"]
    expected = stats.spearmanr(scores, MU.astype(np.float32)).statistic
    assert own["fidelity"]["mean"] == pytest.approx(expected)
    assert own["fidelity_of_ceiling"]["mean"] == pytest.approx(expected / 0.9)
    clean = stats.spearmanr(scores[12:], MU[12:].astype(np.float32)).statistic
    assert own["fidelity_clean"]["mean"] == pytest.approx(clean)
    assert own["auroc"]["mean"] > 0.7
    assert rows["queries"]["stats"]["lds"]["mean"] == pytest.approx(1.0)
    assert rows["queries"]["stats"]["lds_of_ceiling"]["mean"] == pytest.approx(1 / 0.7)
    # the suspicious end of the validation target is the low one
    assert rows["validation"]["stats"]["auroc"]["mean"] == own["auroc"]["mean"]
    assert "fidelity" not in rows["validation"]["stats"]
    assert found["tables"][0]["options"]["LDS ceiling"] == 0.7


def test_several_files_are_several_seeds(score: Score, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{s}.safetensors", self=noisy(s)) for s in range(4)]
    save_file({"self": noisy(4), "queries": torch.tensor(EFFECTS)}, tmp_path / "4.safetensors")
    files.append(tmp_path / "4.safetensors")
    status, printed, _ = score(*files, "--task", "small_world", "--format", "csv", "--name", "me")
    assert status == 0
    (tmp_path / "table.csv").write_text(printed)
    table = pd.read_csv(tmp_path / "table.csv").set_index(["target", "metric"])
    values = {s: stats.spearmanr(noisy(s), MU.astype(np.float32)).statistic for s in range(5)}
    interval = mean_interval(values)
    row = table.loc[("self", "fidelity")]
    assert row["estimator"] == "me"
    assert row["n"] == 5
    assert (row["mean"], row["lower"], row["upper"]) == pytest.approx(tuple(interval))
    pairs = [stats.spearmanr(noisy(a), noisy(b)).statistic for a in range(5) for b in range(a)]
    consistency = table.loc[("self", "consistency_spearman")]
    assert consistency["mean"] == pytest.approx(np.mean(pairs))
    assert set(table.loc["queries", "missing"]) == {"0 1 2 3"}
    _, text, _ = score(*files, "--task", "small_world", "--format", "md")
    assert "missing: 0 · queries · seeds 0, 1, 2, 3: not in its file" in text
    assert "Jaccard@k" in text


def test_the_other_half_and_the_other_sign(score: Score, results: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.safetensors", self=noisy(0))
    truth = results / "ground_truth" / "small_world.safetensors"
    arguments = (file, "--truth", truth, "--format", "json")
    _, published, quiet = score(*arguments)
    status, developed, loud = score(*arguments, "--half", "development")
    a, b = (
        json.loads(text)["tables"][0]["rows"][0]["stats"]["fidelity"]["mean"]
        for text in (published, developed)
    )
    assert status == 0
    assert a == -b
    assert quiet == ""
    assert "do these have the opposite sign?" in loud


def test_files_of_the_store_are_read(score: Score, tmp_path: Path) -> None:
    path = tmp_path / "store.safetensors"
    save_file({"values": noisy(0)[None]}, path, metadata={"target": "self"})
    status, printed, _ = score(path, "--task", "small_world", "--format", "csv")
    assert (status, "store" in printed) == (0, True)
    some = {"values": noisy(0)[None], "watched": torch.arange(5)}
    save_file(some, path, metadata={"target": "self"})
    status, _, errors = score(path, "--task", "small_world")
    assert (status, "scores a sample of the examples" in errors) == (2, True)


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "length": ({"self": torch.rand(59)}, "self has shape (59,), expected (60,) or (1, 60)"),
    "queries": ({"queries": torch.rand(7, 60)}, "shape (7, 60), expected (8, 60)"),
    "turned": ({"queries": torch.rand(60, 8)}, "transpose it"),
    "flat": ({"queries": torch.rand(60)}, "shape (60,), expected (8, 60)"),
    "nan": ({"self": torch.full((60,), torch.nan)}, "holds 60 values that are NaN or infinite"),
    "constant": ({"self": torch.ones(60)}, "self is constant over the examples"),
    "unknown": ({"scores": torch.rand(60)}, "holds scores; none of self, queries, validation"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_refused_tensors(kind: str, score: Score, tmp_path: Path) -> None:
    tensors, message = WRONG[kind]
    file = write(tmp_path / "mine.safetensors", **tensors)
    status, printed, errors = score(file, "--task", "small_world")
    assert (status, printed) == (2, "")
    assert message in errors
    assert str(file) in errors


def test_refused_files(score: Score, results: Path, tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", self=noisy(0))
    status, _, errors = score(good, "--task", "mnist")
    assert status == 2
    assert "no ground truth 'mnist'; there are:" in errors
    assert "small_world" in errors
    assert "there is no score file" in score(tmp_path / "no", "--task", "small_world")[2]
    numpy_file = tmp_path / "scores.npy"
    np.save(numpy_file, MU)
    assert "is no whole safetensors file" in score(numpy_file, "--task", "small_world")[2]
    copy = write(tmp_path / "copy.safetensors", self=noisy(0))
    status, _, errors = score(good, copy, "--task", "small_world")
    assert (status, "hold the same self" in errors) == (2, True)
    truth = results / "ground_truth" / "small_world.safetensors"
    truth.write_bytes(truth.read_bytes()[:-5])
    status, _, errors = score(good, "--task", "small_world")
    assert (status, "is damaged" in errors) == (2, True)


# -------------------------------------------------------------------------------- the runner


def job_in(folder: Path, *estimators: str) -> Job:
    """What ``python -m fine_bench`` would run, without its start-up time."""
    parts = {"task": "digits_mislabel", "model": "mlp"}
    sections = {
        name: OmegaConf.load(config_folder() / name / f"{x}.yaml") for name, x in parts.items()
    }
    options = {"random": "RandomScores", "constant": "ConstantScores"}
    config = {
        **sections,
        "seed": 0,
        "targets": ["self", "queries"],
        "trainer": {"max_epochs": 1, "batch_size": 16, "progress": False, "num_threads": 1},
        "estimators": {x: {"_target_": f"baselines.controls.{options[x]}"} for x in estimators},
        "results_dir": str(folder),
    }
    config["task"].update({"n_train": 120, "n_query": 20})
    return plan(check(OmegaConf.create(config)))


def test_the_runner_knows_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results"
    job = job_in(folder, "random", "constant")
    assert job.truth is None
    mu = np.random.default_rng(3).standard_normal(120)
    effects = np.random.default_rng(4).standard_normal((20, 120))
    truth = replace(
        truth_of(mu, effects, job.data.truth.is_bad.numpy()),
        data_sha256=job.data.sha256,
        setting=job.setting,
    )
    save(truth, folder / "ground_truth")
    job = job_in(folder, "random", "constant")
    assert job.truth is not None
    outcomes = {(o.cell.estimator, o.cell.target): o for o in execute(job, "test")}
    own = outcomes["random", "self"]
    assert own.scores is not None
    found = own.record.metrics
    expected = stats.spearmanr(own.scores.values[0], truth.published.mu_margin).statistic
    assert found["fidelity"] == pytest.approx(expected)
    assert found["fidelity_of_ceiling"] == pytest.approx(expected / 0.9)
    assert found["truth_version"] == 3
    good = ~truth.is_bad
    clean = stats.spearmanr(own.scores.values[0][good], truth.published.mu_margin[good]).statistic
    assert found["fidelity_clean"] == pytest.approx(clean)
    queries = outcomes["random", "queries"].record.metrics
    assert abs(queries["lds"]) < 0.4
    assert queries["lds_of_ceiling"] == pytest.approx(queries["lds"] / 0.7)
    assert np.isnan(outcomes["constant", "self"].record.metrics["fidelity"])
    assert np.isnan(outcomes["constant", "queries"].record.metrics["lds"])
    assert f"fidelity {expected:.3f}" in capsys.readouterr().out
    board = build(RecordStore(folder))
    assert board.complete
    text = to_markdown(board)
    assert "### fidelity to retraining" in text
    assert "fid. within clean" in text
    assert "LDS of ceiling" in text
    assert "undefined: a score that is constant" in text


def test_a_truth_of_another_setting_is_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    job = job_in(folder, "random")
    save(replace(TRUTH, data_sha256=job.data.sha256), folder / "ground_truth")
    assert job_in(folder, "random").truth is None


def test_a_damaged_truth_stops_the_runner_before_training(tmp_path: Path) -> None:
    path = tmp_path / "results" / "ground_truth" / "broken.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"broken\.safetensors is damaged"):
        job_in(tmp_path / "results", "random")


def test_seeds_without_a_fidelity_are_named(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "results")
    base = make_record(
        task="small",
        setting="5e77" * 16,
        data_sha256="da7a" * 16,
        metrics={"n_bad": 12.0},
        cost={"seconds": 1.0},
    )
    compared = {"fidelity": 0.8, "fidelity_of_ceiling": 0.9, "truth_version": 1.0}
    newer = {**compared, "truth_version": 2.0}
    for seed, extra in ((0, compared), (1, newer), (2, {})):
        scores = InfluenceScores(values=noisy(seed)[None], method="fine", target="self")
        store.save(replace(base, seed=seed, metrics={**base.metrics, **extra}), scores)
    board = build(store)
    assert not board.complete
    text = " ".join(board.problems)
    assert "fine self: seeds 2 have no fidelity and are not in its mean" in text
    assert "self: records compare with different versions of the ground truth: [1, 2]" in text


def test_each_target_may_have_a_version_of_the_truth(tmp_path: Path) -> None:
    """Subsets that came later: ``queries`` is compared with version 2, ``self`` still with 1."""
    store = RecordStore(tmp_path / "results")
    base = make_record(task="small", setting="5e77" * 16, data_sha256="da7a" * 16)
    for target, version in (("self", 1.0), ("queries", 2.0)):
        scores = InfluenceScores(values=noisy(0)[None], method="fine", target=target)
        metrics = {"n_bad": 12.0, "truth_version": version}
        store.save(replace(base, target=target, metrics=metrics, cost={"seconds": 1.0}), scores)
    board = build(store)
    assert not any("ground truth" in line for line in board.problems)


def test_records_without_a_truth_show_no_fidelity(tmp_path: Path) -> None:
    job = job_in(tmp_path, "random")
    outcomes = execute(job, "test", say=lambda _: None)
    assert not any("truth_version" in o.record.metrics for o in outcomes)
    board = build(RecordStore(tmp_path))
    assert "fidelity" not in to_markdown(board) + to_csv(board)
    assert "lds" not in to_csv(board)
