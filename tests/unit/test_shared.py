"""What several targets of one run share: one curvature, honest about its cost; batch sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import baselines.influence_functions as module
from baselines import trak
from baselines.controls import MeanTrainingLoss
from baselines.influence_functions import InfluenceFunction
from baselines.trajectory_controls import AUM, EL2N, FinalLoss, ForgettingEvents
from baselines.trak import TRAK
from fine_bench import Checkpoint, Problem, replay
from fine_bench.estimator import Shared, digest_of
from fine_bench.gradients import batch_size
from fine_bench.gradients.batch_size import suitable_batch_size
from fine_bench.gradients.projection.random import Gaussian, Projection
from fine_bench.models.networks import gn_cnn, mlp

N = 30


def problem(queries: object = "self", seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (N,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return Problem(model, F.cross_entropy, TensorDataset(x, y), queries)  # type: ignore[arg-type]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each fit of a curvature."""
    found: list[int] = []
    original = module.fit_ekfac

    def counted(*args: object) -> object:
        found.append(1)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fit_ekfac", counted)
    return found


def test_targets_of_one_run_share_a_curvature(fits: list[int]) -> None:
    first = problem()
    x, y = first.train.tensors  # type: ignore[attr-defined]
    queries = TensorDataset(x[:4] + 0.1, y[:4])
    # as the runner makes them: a data set of its own around the same tensors
    second = replace(first, train=TensorDataset(x, y), queries=queries, reduce="mean")
    checkpoint = Checkpoint(first.model.state_dict(), lr=0.1)
    alone = [replay(InfluenceFunction(), p, [checkpoint]).values for p in (first, second)]
    damped = replay(InfluenceFunction(damping=3.0), first, [checkpoint]).values
    assert len(fits) == 3
    fits.clear()
    shared = Shared(first)
    methods = [InfluenceFunction(), InfluenceFunction()]
    for method, p, expected in zip(methods, (first, second), alone, strict=True):
        assert torch.equal(replay(method, p, [checkpoint], shared).values, expected)
    # another damping shares the eigenbasis and leaves the others as they were
    again = replay(InfluenceFunction(damping=3.0), first, [checkpoint], shared).values
    assert torch.equal(again, damped)
    assert torch.equal(replay(InfluenceFunction(), first, [checkpoint], shared).values, alone[0])
    assert len(fits) == 1
    assert methods[0].saved_seconds == 0.0
    assert methods[1].saved_seconds > 0.0
    # the cost in gradients is that of the method, whoever did the work
    assert methods[1].gradient_evaluations >= 3 * N


def test_other_parameters_or_options_share_nothing(fits: list[int]) -> None:
    task = problem()
    shared = Shared(task)
    state = task.model.state_dict()
    moved = {name: value + 0.1 for name, value in state.items()}
    for params, method in (
        (state, InfluenceFunction()),
        (moved, InfluenceFunction()),
        (state, InfluenceFunction(curvature="empirical_fisher")),
        (state, InfluenceFunction(layers=["2"])),
    ):
        found = replay(method, task, [Checkpoint(params, lr=0.1)], shared).values
        method.gradient_evaluations = 0
        assert torch.equal(found, replay(method, task, [Checkpoint(params, lr=0.1)]).values)
    assert len(fits) == 8
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert digest_of(one) == digest_of(one) != digest_of(other)


def test_targets_of_one_run_share_projected_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    first = problem()
    x, y = first.train.tensors  # type: ignore[attr-defined]
    queries = TensorDataset(x[:4] + 0.1, y[:4])
    second = replace(first, train=TensorDataset(x, y), queries=queries, reduce="mean")
    state = first.model.state_dict()
    checkpoints = [Checkpoint({k: v + c for k, v in state.items()}, lr=0.1) for c in (0.0, 0.1)]

    def method(seed: int = 0) -> TRAK:
        return TRAK("gaussian", dim=8, seed=seed, query_weighting="noise")

    passes: list[int] = []
    original = Projection.project_all

    def counted(self: Projection, batches: Any) -> Any:
        found = original(self, batches)
        passes.append(len(found))
        return found

    monkeypatch.setattr(Gaussian, "project_all", counted)
    for held, expected in ((trak.SHARED_FLOATS, 2 + 2), (0, 3 * 2)):
        monkeypatch.setattr(trak, "SHARED_FLOATS", held)
        alone = [replay(method(), p, checkpoints) for p in (first, second)]
        other = replay(method(1), first, checkpoints)
        passes.clear()
        shared = Shared(first)
        found = [method(), method(), method(1)]
        for one, p, by_itself in zip(found, (first, second, first), [*alone, other], strict=True):
            scores = replay(one, p, checkpoints, shared)
            assert torch.equal(scores.values, by_itself.values)
        assert passes.count(N) == expected
        assert found[1].saved_seconds > 0.0  # at least the products of the features
        assert found[2].saved_seconds == 0.0
        # the cost in gradients is that of the method, whoever did the work
        assert found[1].gradient_evaluations == 2 * (N + 4)


def test_controls_share_one_pass_a_checkpoint() -> None:
    task = problem()
    state = task.model.state_dict()
    checkpoints = [
        Checkpoint({k: v + c for k, v in state.items()}, lr=0.1) for c in (0.0, 0.1, 0.2)
    ]
    passes: list[int] = []
    # the estimators copy the model, hooks included; a method may try it on one example first
    task.model.register_forward_hook(lambda _, x, z: passes.append(len(z)))
    methods = (MeanTrainingLoss, FinalLoss, AUM, EL2N, ForgettingEvents)
    alone = [replay(method(), task, checkpoints).values for method in methods]
    assert passes.count(N) == 3 + 1 + 3 + 3 + 3
    passes.clear()
    shared = Shared(task)
    for method, expected in zip(methods, alone, strict=True):
        assert torch.equal(replay(method(), task, checkpoints, shared).values, expected)
    assert passes.count(N) == 3


def test_other_data_share_nothing(fits: list[int]) -> None:
    task, other = problem(), problem(seed=1)
    shared = Shared(task)
    other = replace(other, model=task.model)
    assert not shared.serves(other)
    assert not shared.serves(replace(task, loss=lambda z, y, reduction: F.cross_entropy(z, y)))
    checkpoint = Checkpoint(task.model.state_dict(), lr=0.1)
    for p in (task, other):
        found = replay(InfluenceFunction(), p, [checkpoint], shared).values
        assert torch.equal(found, replay(InfluenceFunction(), p, [checkpoint]).values)
    assert len(fits) == 4


def test_wide_layers_get_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.zeros(3, dtype=torch.int64)
    perceptron = mlp((1, 28, 28), 10)
    x = torch.rand(3, 1, 28, 28)
    assert suitable_batch_size(perceptron, F.cross_entropy, x, y, 512) == 512
    network = gn_cnn((3, 32, 32), 10)
    x = torch.rand(3, 3, 32, 32)
    # inputs (patches) and output gradients of three convolutions and a linear layer; weight and
    # bias of three normalisations
    floats = 256 * (75 + 32) + 256 * (288 + 64) + 16 * (576 + 128) + 512 + 10 + 2 * (32 + 64 + 128)
    size = suitable_batch_size(network, F.cross_entropy, x, y, 512)
    assert size == batch_size.BATCH_FLOATS // floats
    assert suitable_batch_size(network, F.cross_entropy, x, y, 20) == 20
    monkeypatch.setattr(batch_size, "BATCH_FLOATS", 10)
    assert suitable_batch_size(network, F.cross_entropy, x, y, 512) == batch_size.SMALLEST
    # batch statistics: no per-example gradients, no rule
    coupled = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    assert suitable_batch_size(coupled, F.cross_entropy, torch.rand(3, 4), y, 64) == 64
