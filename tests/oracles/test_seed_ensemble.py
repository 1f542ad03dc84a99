"""The ensemble against a loop over runs, its p-values against scipy's test and by simulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest, ttest_1samp
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from baselines.gradient_similarity import GradCos, GradDot
from baselines.influence_functions import InfluenceFunction
from baselines.seed_ensemble import SeedEnsemble, ratio_and_p
from fine_bench import Checkpoint, InfluenceEstimator, Problem, replay
from fine_bench.estimator import Schedule
from fine_bench.types import UnsupportedProblemError

N, V, CLASSES = 20, 4, 3

BASES: dict[str, InfluenceEstimator] = {
    "influence_function": InfluenceFunction(relative_damping=0.3),
    "grad_dot": GradDot(),
    "grad_cos": GradCos(),
}


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def problem(**options: Any) -> Problem:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N + V, 5, generator=g, dtype=torch.float64)
    y = torch.arange(N + V) % CLASSES
    wanted = {"queries": TensorDataset(x[N:], y[N:]), **options}
    return Problem(net(0), F.cross_entropy, TensorDataset(x[:N], y[:N]), **wanted)


def checkpoints(count: int = 6) -> list[Checkpoint]:
    return [Checkpoint(net(seed).state_dict(), lr=0.1) for seed in range(count)]


@pytest.mark.parametrize("target", [{}, {"queries": "self"}, {"reduce": "mean"}])
@pytest.mark.parametrize("base", BASES)
def test_mean_over_deviation_and_the_test(base: str, target: dict[str, Any]) -> None:
    task = problem(**target)
    if BASES[base].unsupported(task):
        with pytest.raises(UnsupportedProblemError, match="seed_ensemble: the cosine"):
            replay(SeedEnsemble(base=base), task, checkpoints())  # type: ignore[arg-type]
        return
    runs: Tensor = torch.stack([replay(BASES[base], task, [c]).values for c in checkpoints()])
    estimator = SeedEnsemble(base=base, relative_damping=0.3)  # type: ignore[arg-type]
    found = replay(estimator, task, checkpoints())
    expected = runs.mean(0) / runs.std(0)
    assert torch.allclose(found.values, expected, rtol=1e-9)
    assert torch.allclose(found.extras["mean"], runs.mean(0), rtol=1e-11)
    p = torch.as_tensor(ttest_1samp(runs.numpy(), 0.0, axis=0).pvalue)
    assert torch.allclose(found.extras["p_value"], p, rtol=1e-8)
    assert found.extras["p_value"].shape == found.values.shape
    assert estimator.gradient_evaluations > 0


def test_p_values_are_uniform_without_an_effect() -> None:
    g = torch.Generator().manual_seed(3)
    draws = torch.randn(4, 2000, generator=g, dtype=torch.float64)
    p = ratio_and_p(draws.mean(0), draws.std(0), 4)[1]
    assert kstest(p.numpy(), "uniform").pvalue > 0.01
    # a normal test in the place of Student's would reject far too often at four runs
    naive = torch.erfc(2 * (draws.mean(0) / draws.std(0)).abs() / 2**0.5)
    assert float((p < 0.05).double().mean()) < 0.07 < 0.1 < float((naive < 0.05).double().mean())


def test_no_spread_and_no_effect() -> None:
    mean = torch.tensor([0.0, 2.0, -2.0], dtype=torch.float64)
    ratio, p = ratio_and_p(mean, torch.zeros(3, dtype=torch.float64), 3)
    assert ratio[0] == 0
    assert p[0] == 1
    assert torch.isfinite(ratio).all()
    assert ratio[1] == -ratio[2] > 1e15


def test_it_wants_several_different_runs() -> None:
    with pytest.raises(ValueError, match=r"base must be one of .*got 'trak'"):
        SeedEnsemble(base="trak")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"runs must be at least 2, .* got 1"):
        SeedEnsemble(runs=1)
    with pytest.raises(ValueError, match="at least 2 runs, got 1"):
        replay(SeedEnsemble(), problem(), checkpoints(1))
    with pytest.raises(ValueError, match="checkpoints 1 and 2 hold the same parameters"):
        replay(SeedEnsemble(), problem(), [*checkpoints(1), *checkpoints(1)])
    assert SeedEnsemble.schedule is Schedule.RUNS
    assert list(Schedule.RUNS.select([1, 2, 3])) == [1, 2, 3]
