"""The steps that the runner says a run took are those that it took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.unrolled import Unrolled
from fine_bench.data.digits import digits_mislabel
from fine_bench.estimator import replay
from fine_bench.runner.backends import images
from fine_bench.runner.cells import problem_of
from fine_bench.runner.plan import Job
from fine_bench.runner.schema import RunConfig, TrainerConfig


@pytest.mark.parametrize(
    ("n", "changes"),
    [
        (100, {"momentum": 0.9, "lr_schedule": "cosine", "lr": 0.02}),
        (96, {"weight_decay": 0.01}),  # a multiple of the batch: no short batch, other draws
        (100, {"order_seed": 5, "init_seed": 4, "checkpoint_every": 2}),
    ],
    ids=["short last batch", "full last batch", "fixed seeds"],
)
def test_steps_lead_to_the_checkpoints(n: int, changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = TrainerConfig(max_epochs=3, batch_size=16, lr=0.1, progress=False)
    config = RunConfig(
        seed=3,
        model={"_target_": "fine_bench.models.networks.mlp", "hidden": [12]},
        trainer=replace(trainer, **changes),
        results_dir=str(tmp_path),
    )
    job = Job(config, digits_mislabel(seed=0, n_train=n, n_query=20), "0" * 64, ())
    run = images.train(job, [], None)
    assert run.steps is not None
    assert len(run.steps.batches) == run.facts["n_steps"] == 21 - 3 * (n == 96)
    assert run.steps.lr[-1] < run.steps.lr[0] or trainer.lr_schedule == "constant"
    scores = replay(Unrolled(), problem_of(job, "queries", run.model, run.steps), run.checkpoints)
    assert scores.values.shape == (20, n)
    assert float(scores.extras["replay_gap"]) < 1e-4
    again = images.stored(job, pytest.fail)
    assert again is not None
    assert again.steps is not None
    assert all(map(torch.equal, again.steps.batches, run.steps.batches))
