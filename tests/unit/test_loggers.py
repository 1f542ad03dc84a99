"""Who is told of a run: CSV, TensorBoard, nobody; W&B is read back in test_main_command."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from fine_bench.errors import ConfigError
from fine_bench.runner import loggers, wandb_tables
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job, plan
from fine_bench.runner.run_names import MAX_LENGTH, group_name, run_name, tags
from fine_bench.runner.wandb_tables import picture
from fine_bench.store.records import RecordStore
from fine_bench.types import GroundTruth, InfluenceScores

pytestmark = pytest.mark.usefixtures("hydra")

SMALL = (
    "task.n_train=60", "task.n_query=10", "trainer.batch_size=16",
    "trainer.max_epochs=2", "trainer.progress=false",
    "estimator=[fine,random]", "targets=[self]", "seed=3",
)  # fmt: skip


def job(folder: Path, *overrides: str) -> Job:
    return plan(check(compose("config", [f"results_dir={folder}", *SMALL, *overrides])))


def scores_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "scores").rglob("*.safetensors")}


def test_a_csv_file_holds_training_progress_and_results(tmp_path: Path) -> None:
    planned = job(tmp_path, "logger=csv")
    logger = loggers.start_run(planned, "sweep", ["trainer.max_epochs=2"])
    assert isinstance(logger, CSVLogger)
    written = execute(planned, "sweep", logger, say=lambda _: None)
    loggers.finish_run(logger, planned, written)
    (path,) = tmp_path.glob("logs/digits_mislabel/*seed_3*/metrics.csv")
    table = pd.read_csv(path)
    record = next(r for r in RecordStore(tmp_path).scan().records if r.estimator == "fine")
    assert table["train_loss"].dropna().tolist() == pytest.approx(
        record.training["curves"]["train_loss"]
    )
    steps = table["observed_steps/fine/self"].dropna()
    assert len(steps) == 2
    assert steps.is_monotonic_increasing
    (auroc,) = table["self/fine/auroc"].dropna()
    assert auroc == pytest.approx(record.metrics["auroc"])
    assert "max_epochs: 2" in path.with_name("hparams.yaml").read_text()

    # a further sweep keeps the files of the first; nobody told gives the same bits
    again = loggers.start_run(planned, "another sweep", ["trainer.max_epochs=2"])
    assert isinstance(again, CSVLogger)
    assert Path(again.log_dir) != path.parent
    # and so does a job of the same sweep with another estimator, whose name is the same
    beside = loggers.start_run(planned, "sweep", ["trainer.max_epochs=2"])
    assert isinstance(beside, CSVLogger)
    assert Path(beside.log_dir).name == f"{path.parent.name}-2"
    beside.log_metrics({"loss": 1.0}, 0)
    beside.save()
    assert pd.read_csv(path).equals(table)
    alone = job(tmp_path / "none", "logger=none")
    assert loggers.start_run(alone, "sweep") is None
    execute(alone, "sweep", None, say=lambda _: None)
    assert scores_of(tmp_path) == scores_of(tmp_path / "none")


def test_tensorboard_is_refused_before_training_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install tensorboard`, or logger=csv"):
        job(tmp_path, "logger=tensorboard")


def test_tensorboard_draws_histograms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        with pytest.raises(ModuleNotFoundError, match="tensorboard"):
            loggers.start_run(job(tmp_path, "logger=tensorboard"), "sweep")
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    planned = job(tmp_path, "logger=tensorboard")
    logger = loggers.start_run(planned, "sweep")
    assert isinstance(logger, TensorBoardLogger)
    written = execute(planned, "sweep", logger, say=lambda _: None)
    loggers.finish_run(logger, planned, written)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    events.Reload()
    histograms = events.Histograms("mu/fine/self")
    assert [sum(h.histogram_value.bucket) for h in histograms] == [60, 60]
    assert "self/fine/auroc" in events.Tags()["scalars"]


def test_names_say_task_model_and_what_was_changed(tmp_path: Path) -> None:
    planned = job(tmp_path, "logger.tags=[mine]")
    overrides = [
        "trainer.lr=0.1",
        "estimator=[fine]",
        "trainer.num_threads=1",
        "task.noise_rate=0.4",
    ]
    assert run_name(planned, overrides) == "digits_mislabel mlp lr=0.1 noise_rate=0.4 seed 3"
    long = run_name(planned, [f"trainer.lr=0.{'1' * 300}"])
    assert len(long) <= MAX_LENGTH
    assert long.endswith(" seed 3")
    assert group_name(planned) == f"digits_mislabel mlp {planned.setting[:8]}"
    assert group_name(job(tmp_path, "logger.group=ours")) == "ours"
    assert tags(planned, "x") == ["digits_mislabel", "images", "mlp", "sweep x", "mine"]


def test_pictures_use_the_whole_range() -> None:
    x = torch.tensor([[[-1.0, 0.0], [0.5, 1.0]]])
    assert picture(x).tolist() == [[0, 128], [191, 255]]
    assert picture(torch.full((3, 2, 2), 4.0)).tolist() == [[[0] * 3] * 2] * 2


@pytest.mark.parametrize("watched", [None, torch.tensor([0, 1, 3, 4])])
def test_a_curve_is_over_the_examples_of_known_truth(watched: torch.Tensor | None) -> None:
    # the two most suspicious are not known: the first bad one is found at once
    values = torch.tensor([[9.0, 8.0, 0.0, 4.0, 2.0]])
    truth = GroundTruth(
        torch.tensor([False, False, False, True, False]), "kind",
        known=torch.tensor([False, False, True, True, True]),
    )  # fmt: skip
    errors = None
    if watched is not None:
        errors = torch.tensor([[1.0, 1.0, math.inf, 1.0, 1.0]])
    scores = InfluenceScores(values, "m", "self", std_error=errors, watched=watched)
    planned: Any = SimpleNamespace(data=SimpleNamespace(truth=truth), end=lambda target: "high")
    one: Any = SimpleNamespace(scores=scores, cell=SimpleNamespace(target="self"))
    share, recall = wandb_tables._curve(planned, one)
    assert recall[share.index(0.5)] == 1.0
