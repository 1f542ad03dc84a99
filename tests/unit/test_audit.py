"""The auditor's command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import norm

from fine_bench.commands import audit
from fine_bench.store.record_json import PENDING
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores, RunRecord


@pytest.fixture
def results(tmp_path: Path) -> Path:
    store = RecordStore(tmp_path)
    for seed in (0, 1):
        for name, metrics, extras in (
            (
                "fine_paper",
                {
                    "group/flips/mu": 1.2,
                    "group/flips/lower": 0.7 - 1.0 * seed,
                    "group/flips/upper": 1.7,
                    "group/flips/mu_run": 2.4,
                },
                {},
            ),
            ("fine", {}, {"bound": torch.tensor([[0.5, 3.0]])}),
        ):
            scores = InfluenceScores(torch.tensor([[0.1, -0.8]]), name, "self", extras=extras)
            record = RunRecord(
                "toy", "s" * 8, name, "e" * 8, 1, "self", seed, "finished",
                metrics=metrics, scores_sha256=PENDING, data_sha256="d" * 8,
            )  # fmt: skip
            store.save(record, scores)
    return tmp_path


def test_a_group(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--results", str(results), "--task", "toy", "--group", "flips"]
    assert audit.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "seed 0: mu = 1.2 [0.7, 1.7]" in shown
    assert shown.count("Lower bound") == 2
    assert shown.count("Upper bound") == 2
    # δ(1) of μ = 0.7, from the closed form
    delta = norm.cdf(-1 / 0.7 + 0.35) - 2.718281828459045 * norm.cdf(-1 / 0.7 - 0.35)
    assert f"{delta:.4e}" in shown
    # seed 1's interval holds 0: nothing is shown for sure
    assert "|mu| = 0 is what one statistic shows" in shown


def test_an_example(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--results", str(results), "--task", "toy", "--example", "1"]
    assert audit.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "mu = -0.8" in shown
    assert "Upper bound: mu = 3" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "toy", "--group", "none"], "there are: flips"),
        (["--task", "toy", "--example", "7"], "out of range; the task has 0 … 1"),
        (["--task", "other", "--group", "flips"], "no finished record of fine_paper"),
        (["--task", "toy", "--example", "0", "--estimator", "fine_paper"], "run estimator=fine"),
    ],
)
def test_refusals(
    results: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(["--results", str(results), *arguments]) == 2
    assert message in capsys.readouterr().err
