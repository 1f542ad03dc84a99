"""Every control against a loop over examples written from its paper."""

from __future__ import annotations

import copy
import importlib.util
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from baselines import controls, neighbours, trajectory_controls
from baselines.neighbours import nearest_neighbours
from baselines.trajectory_controls import (
    AUM,
    EL2N,
    ConfidentLearning,
    FinalLoss,
    ForgettingEvents,
    KNNDisagreement,
)
from fine_bench import Checkpoint, InfluenceEstimator, Problem, replay
from fine_bench.seeds import stream
from fine_bench.types import UnsupportedProblemError
from support.tensors import close

N, CLASSES = 40, 4

needs_cleanlab = pytest.mark.skipif(
    importlib.util.find_spec("cleanlab") is None, reason="cleanlab is not installed"
)


def make(
    kind: str = "mlp", dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Problem, list[Checkpoint]]:
    """Random data, and five checkpoints so different that predictions come and go."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "mlp":
            model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
            shape: tuple[int, ...] = (6,)
        else:
            model = nn.Sequential(
                nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, CLASSES)
            )
            shape = (2, 5, 4)
    x = torch.randn(N, *shape, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(CLASSES, (N,), generator=generator)
    states = [
        {
            k: (v.double() + torch.randn(v.shape, generator=generator).double()).to(dtype)
            for k, v in model.state_dict().items()
        }
        for _ in range(5)
    ]
    queries = options.pop("queries", "self")
    problem = Problem(model.to(dtype), F.cross_entropy, TensorDataset(x, y), queries, **options)
    return problem, [Checkpoint(params=state, lr=0.1) for state in states]


def logits_at(problem: Problem, checkpoint: Checkpoint) -> Tensor:
    model = copy.deepcopy(problem.model)
    model.load_state_dict(dict(checkpoint.params))
    with torch.no_grad():
        return model(problem.train.tensors[0])  # type: ignore[attr-defined, no-any-return]


def labels_of(problem: Problem) -> list[int]:
    return problem.train.tensors[1].tolist()  # type: ignore[attr-defined, no-any-return]


KINDS = ("mlp", "cnn")


@pytest.mark.parametrize("kind", KINDS)
def test_final_loss(kind: str) -> None:
    problem, checkpoints = make(kind)
    log_p = F.log_softmax(logits_at(problem, checkpoints[-1]), 1)
    expected = [[-float(log_p[i, y]) for i, y in enumerate(labels_of(problem))]]
    close(replay(FinalLoss(), problem, checkpoints).values, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_training_loss(kind: str) -> None:
    problem, checkpoints = make(kind)
    rows = [-F.log_softmax(logits_at(problem, c), 1) for c in checkpoints]
    expected = [[sum(float(r[i, y]) for r in rows) / 5 for i, y in enumerate(labels_of(problem))]]
    close(replay(controls.MeanTrainingLoss(), problem, checkpoints).values, expected, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_norm(kind: str) -> None:
    problem, checkpoints = make(kind)
    model = copy.deepcopy(problem.model)
    model.load_state_dict(dict(checkpoints[-1].params))
    expected = []
    for x, y in problem.train:  # type: ignore[attr-defined]
        loss = F.cross_entropy(model(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        expected.append(float(torch.cat([g.flatten() for g in grads]).norm()))
    close(replay(controls.GradientNorm(), problem, checkpoints).values, [expected])


@pytest.mark.parametrize("kind", KINDS)
def test_aum_is_high_where_another_class_wins(kind: str) -> None:
    problem, checkpoints = make(kind)
    expected = []
    for i, y in enumerate(labels_of(problem)):
        margins = []
        for checkpoint in checkpoints:
            z = logits_at(problem, checkpoint)[i].tolist()
            margins.append(z[y] - max(z[k] for k in range(CLASSES) if k != y))
        expected.append(-sum(margins) / len(margins))
    values = replay(AUM(), problem, checkpoints).values
    close(values, [expected])
    # an example that every checkpoint gets right is not suspicious, one it never does is
    correct = torch.stack([logits_at(problem, c).argmax(1) for c in checkpoints]) == torch.tensor(
        labels_of(problem)
    )
    assert bool((values[0][correct.all(0)] < 0).all())
    assert bool((values[0][~correct.any(0)] > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_el2n(kind: str) -> None:
    problem, checkpoints = make(kind)
    total = torch.zeros(N, dtype=torch.float64)
    for checkpoint in checkpoints:
        p = F.softmax(logits_at(problem, checkpoint), 1)
        for i, y in enumerate(labels_of(problem)):
            total[i] += sum((float(p[i, k]) - (k == y)) ** 2 for k in range(CLASSES)) ** 0.5
    close(replay(EL2N(), problem, checkpoints).values, total[None] / 5)


@pytest.mark.parametrize("kind", KINDS)
def test_forgetting_events(kind: str) -> None:
    problem, checkpoints = make(kind)
    predictions = [logits_at(problem, c).argmax(1).tolist() for c in checkpoints]
    expected = []
    for i, y in enumerate(labels_of(problem)):
        correct = [p[i] == y for p in predictions]
        lost = sum(a and not b for a, b in pairwise(correct))
        expected.append(float(lost if any(correct) else len(checkpoints)))
    assert {0.0, 1.0, 5.0} <= set(expected)
    assert replay(ForgettingEvents(), problem, checkpoints).values.tolist() == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_knn_disagreement(kind: str) -> None:
    problem, checkpoints = make(kind)
    model = copy.deepcopy(problem.model)
    model.load_state_dict(dict(checkpoints[-1].params))
    with torch.no_grad():
        features = model[:-1](problem.train.tensors[0])  # type: ignore[index, attr-defined]
    y = labels_of(problem)
    expected = []
    for i in range(N):
        others = [j for j in range(N) if j != i]
        others.sort(key=lambda j: float((features[i] - features[j]).square().sum()))
        expected.append(sum(y[j] != y[i] for j in others[:7]) / 7)
    close(replay(KNNDisagreement(k=7), problem, checkpoints).values, [expected])


@pytest.mark.parametrize(("n", "k"), [(30, 29), (65, 3), (300, 20), (1500, 5)])
def test_nearest_neighbours_are_exact(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(n)
    features = 50 + torch.randn(n, 5, generator=generator, dtype=torch.float64)
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(float("inf"))
    assert torch.equal(nearest_neighbours(features, k), distance.argsort(1)[:, :k])


@pytest.mark.parametrize("limits", [{"TILE": 64}, {"GROUPS": 2000}, {"CANDIDATES": 1}])
def test_nearest_neighbours_do_not_depend_on_the_tiles(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    features = torch.randn(700, 4, dtype=torch.float64).round(decimals=6)
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(float("inf"))
    for name, value in limits.items():
        monkeypatch.setattr(neighbours, name, value)
    assert torch.equal(nearest_neighbours(features, 9), distance.argsort(1)[:, :9])


@needs_cleanlab
@pytest.mark.parametrize("kind", KINDS)
def test_confident_learning(kind: str) -> None:
    problem, checkpoints = make(kind)
    p = F.softmax(logits_at(problem, checkpoints[-1]), 1)
    y = labels_of(problem)
    thresholds = [
        float(torch.stack([p[i, k] for i in range(N) if y[i] == k]).mean()) for k in range(CLASSES)
    ]
    expected = []
    for i in range(N):
        shifted = [float(p[i, k]) - thresholds[k] + max(thresholds) for k in range(CLASSES)]
        expected.append(1 - shifted[y[i]] / sum(shifted))
    close(replay(ConfidentLearning(), problem, checkpoints).values, [expected])


def test_confident_learning_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, checkpoints = make()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedProblemError, match=r"pip install cleanlab"):
        replay(ConfidentLearning(), problem, checkpoints)


def test_random_and_constant_scores() -> None:
    queries = TensorDataset(torch.randn(3, 6).double(), torch.tensor([0, 2, 2]))
    for reduce, rows in ((None, 3), ("mean", 1), ("class", 2)):
        problem, checkpoints = make(queries=queries, reduce=reduce)
        constant = replay(controls.ConstantScores(), problem, checkpoints).values
        assert torch.equal(constant, torch.ones(rows, N))
        values = replay(controls.RandomScores(seed=3), problem, checkpoints).values
        expected = torch.randn(rows, N, generator=stream(3, "control/random"))
        assert torch.equal(values, expected)


SELF_ONLY: tuple[type[InfluenceEstimator], ...] = (
    controls.MeanTrainingLoss,
    controls.GradientNorm,
    FinalLoss,
    AUM,
    EL2N,
    ForgettingEvents,
    KNNDisagreement,
    pytest.param(ConfidentLearning, marks=needs_cleanlab),  # type: ignore[assignment]
)


@pytest.mark.parametrize("method", SELF_ONLY)
def test_controls_serve_self_only_and_depend_on_no_setting(
    method: type[InfluenceEstimator],
) -> None:
    queries = TensorDataset(torch.randn(3, 6).double(), torch.tensor([0, 2, 2]))
    problem, checkpoints = make(queries=queries)
    assert "has no notion of a query" in str(method().unsupported(problem))
    with pytest.raises(UnsupportedProblemError, match=f"{method.name}: looks at each example"):
        replay(method(), problem, checkpoints)

    problem, _ = make()
    before = {k: v.clone() for k, v in problem.model.state_dict().items()}
    problem.model.train()
    state = torch.get_rng_state()
    expected = replay(method(), problem, checkpoints).values
    assert torch.equal(state, torch.get_rng_state())
    assert problem.model.training
    assert all(p.grad is None for p in problem.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in problem.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in problem.model.modules())
    for options in ({"batch_size": 7}, {"num_workers": 1}):
        close(replay(method(), make(**options)[0], checkpoints).values, expected, 1e-6)
    x, y = problem.train.tensors  # type: ignore[attr-defined]
    shuffled = Problem(
        problem.model, problem.loss, TensorDataset(x.flip(0), y.flip(0)), problem.queries
    )
    close(replay(method(), shuffled, checkpoints).values, expected.flip(1), 1e-6)
    close(replay(method(), *make(dtype=torch.float32)).values, expected, 1e-4)


@pytest.mark.parametrize("method", [m for m in SELF_ONLY if m is not controls.GradientNorm])
def test_no_scores_before_a_checkpoint(method: type[InfluenceEstimator]) -> None:
    unfinished = method()
    unfinished.setup(make()[0])
    with pytest.raises(RuntimeError, match="before update"):
        unfinished.compute()


def test_what_controls_cannot_serve() -> None:
    x = torch.randn(5, 6)
    regression = Problem(nn.Linear(6, 1), F.mse_loss, TensorDataset(x, torch.randn(5, 1)), "self")
    for method in (AUM(), EL2N(), ForgettingEvents(), KNNDisagreement()):
        assert "needs integer class labels" in str(method.unsupported(regression))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        KNNDisagreement(k=0)
    y = torch.zeros(5, dtype=torch.int64)
    small = Problem(nn.Linear(6, 3), F.cross_entropy, TensorDataset(x, y), "self")
    reason = KNNDisagreement().unsupported(small)
    assert reason == "k=20 neighbours need more than 5 training examples"
    conv = nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 3, 1), nn.Flatten())
    no_linear = Problem(conv, F.cross_entropy, TensorDataset(x, y), "self")
    assert "the model has none" in str(KNNDisagreement(k=2).unsupported(no_linear))


def test_the_last_linear_layer_called_is_meant_not_the_last_defined() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.body = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))  # type: ignore[no-any-return]

    model = Reversed()
    x = torch.randn(5, 6)
    problem = Problem(model, F.cross_entropy, TensorDataset(x, torch.arange(5) % 3), "self")
    features = trajectory_controls.penultimate_features(model, problem)
    assert torch.equal(features, model.body(x).detach())
