"""KNN-Shapley: data valuation of a nearest-neighbour classifier, in closed form.

Idea (Jia, Dao, Wang, Hubis, Gurel, Li, Zhang, Spanos, Song: *Efficient Task-Specific Data Valuation
for Nearest Neighbor Algorithms*, VLDB 2019, arXiv:1908.08619). For one query (x, y) a set S of
training examples is worth the share of votes that its K nearest members give to the right label,

    ν(S) = (1/K) Σ_{k=1}^{min(K, |S|)} 1[y_{α_k(S)} = y],

α_k(S) the k-th nearest of S. The Shapley values of this game need no sampling: with the n examples
in order of their distance, α_1 the nearest, and h_i = 1[y_{α_i} = y],

    s_{α_n} = h_n min(K, n) / (K n)
    s_{α_i} = s_{α_{i+1}} + (h_i − h_{i+1}) min(K, i) / (K i),

which is a sum from the far end, O(n log n) a query for the sort. Values of one query add up to
ν(everything). For several queries the game is the mean of theirs, and so are the values.

Deviations and choices: distances are Euclidean between penultimate features, the inputs of the last
``nn.Linear``, of the run at its last checkpoint, as for ``knn_disagreement``; the paper leaves
features to the user. Equal distances are ordered by position. The queries of a mean count equally,
as in the paper. The values are those of the nearest-neighbour classifier, not of the network.

Shapes: n training examples, q queries, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from baselines.trajectory_controls import penultimate_features
from fine_bench.estimator import InfluenceEstimator, Schedule
from fine_bench.gradients.margin import classification_reason
from fine_bench.gradients.query_weighting import query_groups
from fine_bench.types import Checkpoint, InfluenceScores, Problem

_ENTRIES = 2**23
"""Entries of a distance matrix that are sorted at a time."""


def knn_shapley(right: Tensor, k: int) -> Tensor:
    """Shapley values of the examples of each query, in order of their distance.

    Args:
        right: ``(q, n)`` boolean, whether the i-th nearest example has the query's label.
        k: number of neighbours K that vote, 1 … n.

    Returns:
        ``(q, n)`` float64, for the i-th nearest.

    Raises:
        ValueError: k out of range.
    """
    n = right.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of examples, {n}; got {k}")
    h = right.double()
    place = torch.arange(1, n + 1, dtype=torch.float64)
    steps = (h - torch.cat([h[:, 1:], torch.zeros_like(h[:, :1])], 1)) * place.clamp(max=k) / place
    # Σ from the far end; its first term is the value of the farthest example
    return steps.flip(1).cumsum(1).flip(1) / k


class KNNShapley(InfluenceEstimator):
    """Shapley values of the training examples for a K-nearest-neighbour vote on the queries.

    Values are shares of a vote: positive where an example helps the right label to win. They look
    at one checkpoint's features and at no gradient.

    Args:
        k: neighbours that vote, from 1 to n_train.
    """

    name = "knn_shapley"
    version = 1
    schedule = Schedule.LAST

    def __init__(self, k: int = 5) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k

    def unsupported(self, problem: Problem) -> str | None:
        """Needs queries, labels of classes, a linear layer, and at least k examples."""
        if isinstance(problem.queries, str):
            return "values examples for queries; on self every example is its own nearest neighbour"
        reason = classification_reason(problem)
        if reason is not None:
            return reason
        if not any(isinstance(module, nn.Linear) for module in problem.model.modules()):
            return "needs a torch.nn.Linear, whose inputs are the features; the model has none"
        if self.k > problem.n_train:
            return f"k={self.k} neighbours need at least as many training examples, not " + str(
                problem.n_train
            )
        return None

    def update(self, checkpoint: Checkpoint) -> None:
        """Values at this checkpoint; the last one counts."""
        self.load(checkpoint)
        problem = self.problem
        features = penultimate_features(self.model, problem)
        centre = features.mean(0)  # distances keep more digits near the origin
        features = features - centre
        queries = penultimate_features(self.model, problem, "queries") - centre
        labels, wanted = problem.labels("train"), problem.labels("queries")
        weights = query_groups(wanted, problem.reduce)
        found = torch.zeros(len(weights), problem.n_train, dtype=torch.float64)
        half_squares = 0.5 * features.square().sum(1)
        for part in torch.split(torch.arange(len(queries)), max(1, _ENTRIES // problem.n_train)):
            # ‖x − z‖² is smallest where ‖z‖²/2 − ⟨x, z⟩ is
            far = half_squares - queries[part] @ features.T
            order = far.argsort(dim=1, stable=True)
            values = knn_shapley(labels[order] == wanted[part][:, None], self.k)
            found += weights[:, part] @ torch.zeros_like(values).scatter_(1, order, values)
        self._values = found.to(features.dtype)

    def compute(self) -> InfluenceScores:
        """The values."""
        self.require_update()
        return InfluenceScores(
            self._values, method=self.name, target=self.problem.target, version=self.version
        )
