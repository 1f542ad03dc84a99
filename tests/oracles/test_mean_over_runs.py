"""Averages over runs: each run's scores as if alone; TRAK over several models by its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from baselines.gradient_similarity import GradDot
from baselines.influence_functions import InfluenceFunction
from baselines.kernel_regression import TangentKernel
from baselines.kfac import KFAC
from baselines.mean_over_runs import MeanOverRuns
from baselines.tracin import TracIn
from baselines.trak import TRAK
from fine_bench import Checkpoint, Problem, replay
from fine_bench.estimator import Schedule
from fine_bench.gradients import GradientEngine
from fine_bench.gradients.margin import negative_margin
from fine_bench.gradients.projection.random import make_projection, projection_matrix
from fine_bench.seeds import derive

N, V, CLASSES, RUNS, EPOCHS = 40, 6, 3, 3, 4


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double()


def problem(**options: Any) -> Problem:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(N + V, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (N + V,), generator=generator)
    queries = options.pop("queries", TensorDataset(x[N:], y[N:]))
    return Problem(net(0), F.cross_entropy, TensorDataset(x[:N], y[:N]), queries, **options)


def trained(seed: int) -> list[Checkpoint]:
    """A run's checkpoints, with the steps that lead to each."""
    model, data = net(seed), problem().train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    points = []
    for epoch in range(1, EPOCHS + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()  # type: ignore[attr-defined, no-untyped-call]
        optimizer.step()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        points.append(Checkpoint(state, lr=0.3, step=10 * epoch))
    return points


ALL = [trained(seed) for seed in range(RUNS)]
FLAT = [point for run in ALL for point in run]


def seed_of(run: int) -> int:
    return derive(3, f"mean over runs/{run}")


BASES: dict[str, tuple[dict[str, Any], Any]] = {
    "kfac": ({"relative_damping": 0.5}, lambda run: KFAC(relative_damping=0.5)),
    "influence_function": ({}, lambda run: InfluenceFunction(seed=seed_of(run))),
    "tracin": ({"every": 3}, lambda run: TracIn(every=3)),
    "tangent_kernel": ({"every": 3}, lambda run: TangentKernel(every=3, seed=seed_of(run))),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("reduce", [None, "mean"])
def test_it_is_the_mean_of_what_each_run_says(base: str, reduce: Any) -> None:
    options, alone = BASES[base]
    asked = problem(reduce=reduce)
    parts = [replay(alone(run), asked, points).values for run, points in enumerate(ALL)]
    estimator = MeanOverRuns(base, RUNS, options, seed=3)
    found = replay(estimator, asked, FLAT)
    torch.testing.assert_close(found.values, torch.stack(parts).mean(0), rtol=1e-10, atol=1e-14)
    assert not torch.allclose(parts[0], parts[1], rtol=0.05)
    single = alone(0)
    replay(single, asked, ALL[0])
    assert estimator.gradient_evaluations == RUNS * single.gradient_evaluations
    # again, from the start
    again = replay(estimator, asked, FLAT)
    assert torch.equal(again.values, found.values)


def test_the_last_checkpoints_are_enough_for_a_base_that_reads_no_others() -> None:
    whole = replay(MeanOverRuns("grad_dot"), problem(), FLAT).values
    ends = [run[-1] for run in ALL]
    assert torch.equal(replay(MeanOverRuns("grad_dot"), problem(), ends).values, whole)
    bare = [Checkpoint(point.params, point.lr) for point in ends]
    assert torch.equal(replay(MeanOverRuns("grad_dot"), problem(), bare).values, whole)


@pytest.mark.parametrize("base", ["grad_dot", "kfac"])
def test_runs_of_different_lengths_count_once_each(base: str) -> None:
    """A run that goes on for longer than the one before it (one stopped early) is another run."""
    lengths = (2, 3, EPOCHS)
    parts = [points[:length] for points, length in zip(ALL, lengths, strict=True)]
    alone = [GradDot() if base == "grad_dot" else KFAC() for _ in parts]
    each = [replay(one, problem(), run).values for one, run in zip(alone, parts, strict=True)]
    estimator = MeanOverRuns(base, RUNS)
    flat = [point for run in parts for point in run]
    for _ in range(2):
        found = replay(estimator, problem(), flat)
        torch.testing.assert_close(found.values, torch.stack(each).mean(0), rtol=1e-10, atol=1e-14)
    # by hand, nobody has selected: every checkpoint comes, and steps tell the runs apart
    estimator.setup(problem())
    for point in flat:
        estimator.update(point)
    torch.testing.assert_close(estimator.compute().values, found.values, rtol=1e-10, atol=1e-14)


def test_where_a_run_ends_must_be_known() -> None:
    bare = [Checkpoint(point.params, point.lr) for point in FLAT]
    with pytest.raises(
        ValueError, match=r"kfac reads all .* pass Checkpoint\(params, lr, step=…\)"
    ):
        replay(MeanOverRuns("kfac"), problem(), bare)


def test_refusals() -> None:
    assert MeanOverRuns.schedule is Schedule.ALL_RUNS
    with pytest.raises(ValueError, match=r"base must be one of influence_function, kfac, .*'aum'"):
        MeanOverRuns("aum")
    with pytest.raises(ValueError, match="at least 1, got 0; try runs=5"):
        MeanOverRuns(runs=0)
    with pytest.raises(
        ValueError, match="tracin has no option dim; it has every, and seed, layers"
    ):
        MeanOverRuns("tracin", options={"dim": 3})
    with pytest.raises(ValueError, match="kfac has no option layers; it has relative_damping, "):
        MeanOverRuns("kfac", options={"layers": ["0"]})
    with pytest.raises(ValueError, match="grad_cos has no option x; it has every, and"):
        MeanOverRuns("grad_cos", options={"x": 3})
    asked = problem(queries="self")
    assert MeanOverRuns("grad_cos").unsupported(asked)


# ------------------------------------------------------------------------------ TRAK, M models


def features(asked: Problem, point: Checkpoint, which: Any, p_matrix: Tensor) -> Tensor:
    model = net(0)
    model.load_state_dict(dict(point.params))
    engine = GradientEngine(model, negative_margin)
    rows = [engine(x, y).dense() for _, x, y in asked.batches(which)]
    return torch.cat(rows) @ p_matrix


def matrix(asked: Problem, seed: int) -> Tensor:
    _, x, y = next(iter(asked.batches("train", 2)))
    g = GradientEngine(net(0), F.cross_entropy)(x, y)
    return projection_matrix(make_projection("rademacher", 8, seed), g)


def test_trak_over_models_is_its_formula() -> None:
    """mean over models of the kernels times mean of 1 − p, each model with its own projection."""
    asked, ends = problem(), [run[-1] for run in ALL]
    kernels, residuals = [], []
    for number, point in enumerate(ends):
        seed = 5 if number == 0 else derive(5, f"trak/model {number}")
        p_matrix = matrix(asked, seed)
        phi = features(asked, point, "train", p_matrix)
        queries = features(asked, point, "queries", p_matrix)
        kernels.append(queries @ torch.linalg.inv(phi.T @ phi) @ phi.T)
        model = net(0)
        model.load_state_dict(dict(point.params))
        x, y = asked.train.tensors  # type: ignore[attr-defined]
        residuals.append(1 - F.softmax(model(x), 1).gather(1, y[:, None])[:, 0].detach())
    expected = torch.stack(kernels).mean(0) * torch.stack(residuals).mean(0)
    estimator = TRAK("rademacher", 8, seed=5, runs=RUNS)
    assert estimator.schedule is Schedule.RUNS
    assert TRAK("rademacher", 8).schedule is Schedule.ALL
    for _ in range(2):  # a second call begins with the first projection again
        found = replay(estimator, asked, ends).values
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    shared = replay(TRAK("rademacher", 8, seed=5), asked, ends).values
    assert not torch.allclose(shared, expected, rtol=0.05)


def test_trak_refuses_other_numbers_of_models() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0; the paper has"):
        TRAK(runs=0)
    with pytest.raises(ValueError, match="runs=2 models and got another; pass the last"):
        replay(TRAK("rademacher", 8, runs=2), problem(), FLAT)
