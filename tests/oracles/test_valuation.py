"""KNN-Shapley against the definition of a Shapley value, Data-OOB against counting by hand."""

from __future__ import annotations

import copy
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.ensemble import BaggingClassifier
from torch import nn
from torch.utils.data import TensorDataset

from baselines.data_oob import DataOOB
from baselines.knn_shapley import KNNShapley, knn_shapley
from fine_bench import Checkpoint, Problem, replay
from fine_bench.seeds import derive
from fine_bench.types import UnsupportedProblemError


def exact(right: np.ndarray, k: int) -> np.ndarray:
    """Shapley values by their definition over all subsets; examples in order of distance."""
    n = len(right)

    def worth(members: tuple[int, ...]) -> float:
        return float(right[sorted(members)[:k]].sum()) / k

    values = np.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            weight = 1 / (n * comb(n - 1, size))
            for some in combinations(others, size):
                values[i] += weight * (worth((*some, i)) - worth(some))
    return values


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (5, 5), (7, 3), (8, 2), (8, 5)])
def test_the_closed_form_is_the_shapley_value(n: int, k: int) -> None:
    right = np.random.default_rng(n + 10 * k).random((4, n)) < 0.5
    right[0] = True
    found = knn_shapley(torch.from_numpy(right), k).numpy()
    expected = np.stack([exact(row, k) for row in right])
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    # efficiency: the values add up to the worth of all examples
    np.testing.assert_allclose(found.sum(1), right[:, :k].sum(1) / k, rtol=1e-12, atol=1e-14)


def test_a_neighbour_vote_has_a_range() -> None:
    with pytest.raises(ValueError, match="k must be from 1 to the number of examples, 3; got 4"):
        knn_shapley(torch.ones(1, 3, dtype=torch.bool), 4)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        KNNShapley(k=0)


N, Q, D, CLASSES = 12, 5, 3, 3


def question(reduce: object = None, queries: object = None, n: int = N) -> Problem:
    draw = torch.Generator().manual_seed(4)
    x, xq = (torch.randn(m, D, generator=draw, dtype=torch.float64) for m in (n, Q))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    return Problem(
        model=net,
        loss=F.cross_entropy,
        train=TensorDataset(x, torch.arange(n) % CLASSES),
        queries=queries or TensorDataset(xq, torch.tensor([0, 1, 1, 2, 2])),  # type: ignore[arg-type]
        reduce=reduce,  # type: ignore[arg-type]
    )


def ask(estimator: KNNShapley | DataOOB, problem: Problem) -> torch.Tensor:
    return replay(estimator, problem, [Checkpoint(problem.model.state_dict(), 0.1)]).values


def test_values_lie_at_their_examples_and_are_averaged_over_queries() -> None:
    problem = question()
    found = ask(KNNShapley(k=2), problem)
    (x, y), (xq, yq) = problem.train.tensors, problem.queries.tensors  # type: ignore[union-attr]
    body = copy.deepcopy(problem.model)[:2]  # type: ignore[index]
    with torch.no_grad():
        distance = torch.cdist(body(xq), body(x)).numpy()
    expected = np.zeros((Q, N))
    for v in range(Q):
        order = np.argsort(distance[v])
        expected[v, order] = knn_shapley((y[order] == yq[v])[None], 2)[0].numpy()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    mean = ask(KNNShapley(k=2), question("mean")).numpy()
    np.testing.assert_allclose(mean[0], expected.mean(0), rtol=1e-12)
    classes = ask(KNNShapley(k=2), question("class")).numpy()
    np.testing.assert_allclose(classes[1], expected[1:3].mean(0), rtol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "problem", "why"),
    [
        (KNNShapley(), question(queries="self"), "every example is its own nearest neighbour"),
        (KNNShapley(k=13), question(), "k=13 neighbours need at least as many training examples"),
        (DataOOB(), question(), "looks at each example alone"),
        (DataOOB(max_train=11), question(queries="self"), "12 examples are more than max_train=11"),
    ],
)
def test_reasons(estimator: KNNShapley | DataOOB, problem: Problem, why: str) -> None:
    with pytest.raises(UnsupportedProblemError, match=why):
        ask(estimator, problem)


def test_models_without_features_and_inputs_without_numbers() -> None:
    problem = question()
    convolutions = nn.Sequential(nn.Conv1d(1, 3, 3), nn.Flatten())
    x = torch.randn(6, 1, 3)
    images = TensorDataset(x, torch.arange(6) % 3)
    other = Problem(model=convolutions, loss=F.cross_entropy, train=images, queries=images)
    with pytest.raises(UnsupportedProblemError, match=r"needs a torch.nn.Linear"):
        ask(KNNShapley(), other)
    embedding = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    tokens = TensorDataset(torch.randint(5, (6, 2)), torch.arange(6) % 3)
    words = Problem(model=embedding, loss=F.cross_entropy, train=tokens, queries="self")
    with pytest.raises(UnsupportedProblemError, match="needs real-valued inputs, on which trees"):
        ask(DataOOB(), words)
    regression = Problem(
        model=problem.model, loss=F.mse_loss, train=TensorDataset(x[:, 0], x[:, 0]), queries="self"
    )
    with pytest.raises(UnsupportedProblemError):
        ask(DataOOB(), regression)


def test_out_of_bag_accuracy_by_hand() -> None:
    problem = question(queries="self", n=40)
    x, y = (t.numpy() for t in problem.train.tensors)  # type: ignore[union-attr]
    found = ask(DataOOB(n_trees=15, components=2, seed=3), problem)[0].numpy()
    z = PCA(2).fit_transform(x)
    state = derive(3, "control/data_oob") % 2**32
    bags = BaggingClassifier(n_estimators=15, random_state=state).fit(z, y)
    for i in range(40):
        out = [t for t, seen in zip(bags.estimators_, bags.estimators_samples_, strict=True)
               if i not in set(seen)]  # fmt: skip
        wrong = np.mean([t.predict(z[i : i + 1])[0] != y[i] for t in out])
        assert found[i] == pytest.approx(wrong)
    assert (found != ask(DataOOB(n_trees=15, components=2, seed=4), problem)[0].numpy()).any()


def test_flipped_labels_are_out_of_bag_wrong() -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = F.one_hot(y, 3).double() + 0.1 * torch.randn(90, 3, generator=draw, dtype=torch.float64)
    bad = torch.arange(90) < 9
    given = torch.where(bad, (y + 1) % 3, y) + 5  # classes need not count from 0
    net = nn.Linear(3, 8).double()
    train = TensorDataset(x, given)
    problem = Problem(model=net, loss=F.cross_entropy, train=train, queries="self")
    values = ask(DataOOB(n_trees=40), problem)[0]
    assert values[bad].min() > 0.5
    assert values[~bad].median() < 0.1


def test_options_of_data_oob() -> None:
    with pytest.raises(ValueError, match="n_trees must be at least 1, got 0"):
        DataOOB(n_trees=0)
    with pytest.raises(ValueError, match="components must be at least 1, got 0"):
        DataOOB(components=0)
    with pytest.raises(ValueError, match=r"examples are in the bags of all 1 trees; raise n_trees"):
        ask(DataOOB(n_trees=1), question(queries="self"))
