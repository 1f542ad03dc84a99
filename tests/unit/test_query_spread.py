"""The check of f-INE's σ_q and intervals on numbers whose answer is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fine_bench.retraining.truth import SubsetTruth
from fine_bench.types import InfluenceScores
from support.benchmarks import loaded


def test_a_truth_that_is_what_the_scores_say() -> None:
    script = loaded("query_spread")
    rng = np.random.default_rng(0)
    n, q, subsets = 40, 12, 400
    members = rng.random((subsets, n)) < 0.5
    spread = np.linspace(0.5, 2.0, q)
    mu = rng.normal(size=(q, n))
    margin = 3.0 * members.astype(float) @ (mu * spread[:, None]).T
    noise = [rng.normal(size=(subsets, q)) * 1.5 * spread / 3**0.5 for _ in range(2)]
    truth = SubsetTruth(
        members, margin.astype(np.float32), *((margin + e).astype(np.float32) for e in noise), 6
    )
    scores = InfluenceScores(
        torch.tensor(mu), "fine", "queries", extras={"spread": torch.tensor(spread)}
    )
    found = script.against_truth(scores, truth)
    assert found["effect"] == pytest.approx(3.0, rel=1e-4)
    assert found["slope"] == pytest.approx(1.5, rel=0.05)
    assert found["rank"] > 0.97


def test_coverage_of_independent_runs() -> None:
    script = loaded("query_spread")
    g = torch.Generator().manual_seed(0)
    size = torch.rand(5000, generator=g).double()
    mu = size * 20 + torch.randn(50, 5000, generator=g, dtype=torch.float64)
    found = script.coverage(mu, torch.ones_like(mu))
    for level, shares in found.items():
        assert shares == pytest.approx([level] * 3, abs=0.02)
    assert script.coverage(mu, 0 * mu)[0.95] == [0.0, 0.0, 0.0]


def test_runs_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "records").mkdir()
    monkeypatch.setattr(
        sys, "argv", ["query_spread.py", "--task", "mnist_mlp", "--results", str(tmp_path)]
    )
    with pytest.raises(SystemExit, match="found 0 seeds of fine_queries on mnist_mlp"):
        loaded("query_spread").main()


def test_what_the_truth_alone_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = loaded("query_spread")
    rng = np.random.default_rng(0)
    members, spread = rng.random((400, 20)) < 0.5, np.linspace(0.5, 2.0, 12)
    mean = 3.0 * rng.normal(size=(400, 12))
    one, other = (mean + rng.normal(size=(400, 12)) * spread / 3**0.5 for _ in range(2))
    truth = SubsetTruth(members, (one + other) / 2, one, other, 6)
    said = script.of_truth(truth).split("\n")
    assert float(said[0].split(", ")[-1]) > 0.95
    for line in said[1:]:
        least, *_, largest = line.split("σ_q: ")[1].split(" logits")[0].split(", ")
        assert (float(least), float(largest)) == pytest.approx((0.5, 2.0), rel=0.15)
        assert float(line.split("make up ")[1].split("%")[0]) < 2  # one width after every subset
    monkeypatch.setattr(sys, "argv", ["query_spread.py", "--task", "mnist_mlp", "--truth-alone"])
    monkeypatch.chdir(Path(__file__).parents[2])
    script.main()
    out = capsys.readouterr().out
    assert "rank correlation of the halves over 200 queries, 0.867" in out  # as in docs/methods.md
    assert "0.354, 0.551, 1.043, 1.423 logits; widths make up 3.78% of" in out
