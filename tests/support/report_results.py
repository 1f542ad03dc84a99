"""A small results folder for the tests of the report: three methods and the paper's, on digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fine_bench.data.digits import digits_mislabel
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.report.figures.tables import TRUTH
from fine_bench.retraining.truth import HalfTruth, Truth
from fine_bench.store.records import RecordStore
from fine_bench.types import SUSPICIOUS_END, InfluenceScores, RunRecord, Target
from support.records import digits_run, make_record

N = 60
TASK = digits_run(N, 10)["task"]
DATA = digits_mislabel(seed=0, n_train=N, n_query=10)
BAD = DATA.truth.is_bad
CLASSES = {
    "fine": "fine_bench.callback.FINECallback",
    "tracin": "baselines.tracin.TracIn",
    "constant": "baselines.controls.ConstantScores",
}
SETTING = "0123456789abcdef"
EVIL = '<img src=x onerror="alert(1)">'


def scores_of(estimator: str, target: Target, seed: int) -> InfluenceScores:
    if estimator == "constant":
        return InfluenceScores(torch.ones(1, N), estimator, target, extras={TRUTH: BAD})
    draw = torch.Generator().manual_seed(10 * seed + len(estimator))
    sign = 1.0 if SUSPICIOUS_END[target] == "high" else -1.0
    strength = 3.0 if estimator == "fine" else 1.0
    values = sign * strength * BAD + torch.randn(1, N, generator=draw)
    return InfluenceScores(values, estimator, target, extras={TRUTH: BAD})


def paper_scores(seed: int) -> InfluenceScores:
    """The paper's estimator on a third of the examples, with intervals, p-values and traces."""
    draw = np.random.default_rng(seed)
    watched = torch.arange(0, N, 3)
    values = torch.zeros(1, N)
    values[0, watched] = torch.tensor(draw.normal(size=len(watched)), dtype=torch.float32)
    own = values[0, watched]
    p, q = draw.normal(size=(2, 200)) + np.array([[1.0], [0.2]]), draw.normal(size=(2, 200))
    extras = {
        TRUTH: BAD,
        "lower": own - 0.5,
        "upper": own + 0.5,
        "p_value": torch.exp(-own.abs()),
        "trace/p": torch.tensor(p),
        "trace/q": torch.tensor(q),
        "trace/step": torch.arange(200),
        "trace/subset": torch.tensor([3, -1]),
    }
    return InfluenceScores(values, "fine_paper", "self", watched=watched, extras=extras)


def record_of(estimator: str, target: Target, seed: int, scores: InfluenceScores) -> RunRecord:
    row = suspicion(scores.values, SUSPICIOUS_END[target])
    metrics = {**detection_metrics(row, BAD), "n_bad": float(BAD.sum())}
    if target == "self" and estimator != "fine_paper":
        level = {"fine": 0.9, "tracin": 0.7}.get(estimator, float("nan")) + seed / 100
        metrics |= {"fidelity": level, "fidelity_of_ceiling": level / 0.98, "truth_version": 1.0}
    if scores.watched is not None:
        metrics |= {"n_watched": float(len(scores.watched)), "n_bad": 4.0}
        metrics |= {
            f"group/flips_1_to_2/{name}": value
            for name, value in {
                "index": 0.0, "mu": 1.44, "lower": 1.2, "upper": 1.6, "p_value": 1e-9,
                "size": 7.0, "mu_run": 40.0,
            }.items()
        }  # fmt: skip
    name = CLASSES.get(estimator, "fine_bench.callback.paper.PaperFINECallback")
    return make_record(
        task="digits_mislabel",
        setting=SETTING,
        estimator=estimator,
        target=target,
        seed=seed,
        metrics=metrics,
        cost={"seconds": 1.0 + len(estimator)},
        data_sha256=DATA.sha256,
        config={"estimator": {"_target_": name}, "model": {"name": "mlp"}, "task": TASK},
        environment={"commit": "c0ffee", "dirty": False, "torch": "2.13.0"},
        training={"test_accuracy": 0.9, "curves": {"test_loss": [2.0 - seed / 9, 1.0]}},
    )


def fill(root: Path, seeds: tuple[int, ...] = (0, 1, 2), **changes: Any) -> RecordStore:
    store = RecordStore(root)
    for estimator in CLASSES:
        targets: tuple[Target, ...] = ("self", "validation")
        for target in targets:
            for seed in seeds:
                scores = scores_of(estimator, target, seed)
                store.save(replace(record_of(estimator, target, seed, scores), **changes), scores)
    for seed in seeds:
        scores = paper_scores(seed)
        store.save(replace(record_of("fine_paper", "self", seed, scores), **changes), scores)
    return store


def truth() -> Truth:
    mu = np.linspace(-1, 3, N).astype(np.float32)
    half = HalfTruth(mu, np.full(N, 0.25, np.float32), mu, mu, mu, mu, 512, 0.98, 0.95)
    return Truth(
        "digits_test", "digits_mislabel", 1, DATA.sha256, SETTING, 0.5, BAD.numpy(), half, half
    )
