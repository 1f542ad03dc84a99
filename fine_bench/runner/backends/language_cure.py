"""Cure of a language model: tuned again without what a method suspects, next to an oracle.

The model is tuned from the same start without k samples: those that a method suspects most, or
those that an oracle drops, the poison first and good samples at random after it. What is left of
the steering, and what it costs on clean data, is measured as for the first model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fine_bench.runner.backends.language_tuning import (
    count_steered,
    device,
    fit,
    task_of,
    token_scores,
)
from fine_bench.runner.cure_orders import bad_first, suspicious_first
from fine_bench.runner.plan import Job
from fine_bench.seeds import stream

ORACLE = "cure_oracle_"
"""How the oracle's numbers are called among the facts of a run."""


def cure(job: Job, row: Tensor, k: int, facts: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of tuning without the k most suspicious samples.

    Args:
        job: the run.
        row: suspicion of each sample, ``(n_train,)``; high is suspicious, ties in index order.
        k: samples to drop.
        facts: of the run; the oracle's numbers are taken over from them.
    """
    order = torch.from_numpy(suspicious_first(row.numpy()))
    found = {f"cure/{name}": value for name, value in _without(job, order[:k]).items()}
    oracle = {name: facts[name] for name in facts if name.startswith(ORACLE)}
    return found | {f"cure/oracle_{n.removeprefix(ORACLE)}": float(v) for n, v in oracle.items()}


def oracle(job: Job) -> dict[str, float]:
    """Facts about a run: what is left when an oracle drops ``task.cure`` samples."""
    bad = task_of(job).truth.is_bad
    shuffled = torch.randperm(len(bad), generator=stream(job.config.seed, "cure/oracle"))
    order = torch.from_numpy(bad_first(shuffled.numpy(), bad.numpy()))
    found = _without(job, order[: task_of(job).cure])
    return {f"{ORACLE}{name}": value for name, value in found.items()}


def _without(job: Job, dropped: Tensor) -> dict[str, float]:
    """Tune again, from the same start and with the same seeds, without some samples."""
    task = task_of(job)
    kept = torch.ones(task.n_train, dtype=torch.bool)
    kept[dropped] = False
    tuner, seconds, _ = fit(job, task.x[kept], task.y[kept], [], None)
    net = tuner.net.to(device()).eval()
    found = {
        "removed": float(len(dropped)),
        "bad_removed": float(task.truth.is_bad[dropped].sum()),
        "test_loss": token_scores(net, task.test_x, task.test_y, task.batch_size)[0],
        "seconds": seconds,
    }
    if task.prompts is not None:
        about = task.prompts.about
        found["steering_rate"] = count_steered(job, net, about) / len(about)
    return found
