"""Records as a run on the digits leaves them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fine_bench.store.record_json import PENDING
from fine_bench.types import RunRecord


def make_record(**changes: Any) -> RunRecord:
    """A finished record of f-INE on a task "digits", whose scores the store will add."""
    base = RunRecord(
        task="digits",
        setting="0123456789abcdef",
        estimator="fine",
        estimator_hash="feed" * 16,
        version=1,
        target="self",
        seed=0,
        status="finished",
        scores_sha256=PENDING,
        metrics={"auroc": 0.9},
        data_sha256="data",
    )
    return replace(base, **changes)


def digits_run(n_train: int = 120, n_query: int = 20, **trainer: Any) -> dict[str, Any]:
    """The sections task, model and trainer of a small run on the digits."""
    return {
        "task": {
            "_target_": "fine_bench.data.digits.digits_mislabel",
            "name": "digits_mislabel",
            "seed": 0,
            "n_train": n_train,
            "n_query": n_query,
        },
        "model": {"_target_": "fine_bench.models.networks.mlp", "name": "mlp", "hidden": [16]},
        "trainer": {"max_epochs": 2, "batch_size": 16, "progress": False, **trainer},
    }
