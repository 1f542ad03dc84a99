"""Agreement of the paper's estimator with the all-example one: known lines and ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fine_bench.metrics.agreement import agreement
from fine_bench.types import InfluenceScores

N = 30
WATCHED = torch.arange(0, N, 2)


def scores(values: Tensor, **options: Any) -> InfluenceScores:
    return InfluenceScores(values.reshape(1, -1), "m", options.pop("target", "self"), **options)


def pair(x: Tensor, y: Tensor) -> tuple[InfluenceScores, InfluenceScores]:
    """The paper's scores of the watched examples, and all-example scores; noise elsewhere."""
    everyone = 100 * torch.ones(N)
    everyone[WATCHED] = x
    some = torch.zeros(N)
    some[WATCHED] = y
    return scores(some, watched=WATCHED), scores(everyone)


def test_a_line_is_found_on_the_watched_examples() -> None:
    x = torch.linspace(-2, 3, 15)
    found = agreement(*pair(x, 3 * x + 0.5))
    assert found["n"] == 15
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(1.0)
    assert found["slope"] == pytest.approx(3.0, rel=1e-5)
    assert found["intercept"] == pytest.approx(0.5, rel=1e-5)
    through = float((x @ (3 * x + 0.5)) / (x @ x))
    assert found["slope_through_origin"] == pytest.approx(through, rel=1e-5)


def test_strata_are_thirds_by_size() -> None:
    x = torch.tensor([1.0, -1.1, 1.2, -1.3, 1.4, 5, -5.1, 5.2, -5.3, 5.4, 9, -9.1, 9.2, -9.3, 9.4])
    y = torch.where(x.abs() < 4, -x, torch.where(x.abs() < 7, 2 * x, x))
    found = agreement(*pair(x, y))
    for number, (slope, rho) in enumerate([(-1, -1), (2, 1), (1, 1)], 1):
        assert found[f"tercile_{number}/n"] == 5
        assert found[f"tercile_{number}/slope_through_origin"] == pytest.approx(slope, rel=1e-5)
        assert found[f"tercile_{number}/spearman"] == pytest.approx(rho)


def test_all_examples_watched() -> None:
    x = torch.randn(N, generator=torch.Generator().manual_seed(1))
    assert agreement(scores(2 * x), scores(x))["slope"] == pytest.approx(2.0)


def test_what_cannot_be_said_is_nan() -> None:
    x = torch.linspace(-2, 3, 15)
    constant = agreement(*pair(x, torch.ones(15)))
    assert math.isnan(constant["spearman"])
    assert math.isnan(constant["slope"])
    zero = agreement(*pair(torch.zeros(15), x))
    assert math.isnan(zero["slope_through_origin"])
    two = agreement(
        scores(torch.arange(N) / 1.0, watched=torch.tensor([3, 5])), scores(torch.arange(N) / 1.0)
    )
    assert (two["n"], two["tercile_3/n"]) == (2, 0)
    assert math.isnan(two["spearman"])
    assert two["slope_through_origin"] == 1.0


def test_misuse_is_refused() -> None:
    x = torch.arange(N) / 1.0
    with pytest.raises(ValueError, match="targets differ"):
        agreement(scores(x), scores(x, target="validation"))
    with pytest.raises(ValueError, match="one training set"):
        agreement(scores(x), scores(x[:-1]))
    rows = InfluenceScores(torch.ones(2, N), "m", "self")
    with pytest.raises(ValueError, match="one row"):
        agreement(rows, rows)
    with pytest.raises(ValueError, match="all-example scores"):
        agreement(scores(x), scores(x, watched=WATCHED))
    with pytest.raises(ValueError, match="no single example is watched"):
        agreement(scores(x, watched=WATCHED[:0]), scores(x))
