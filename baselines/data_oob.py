"""Data-OOB: how often trees that never saw an example get its label right.

Idea (Kwon, Zou: *Data-OOB: Out-of-bag Estimate as a Simple and Efficient Data Value*, ICML 2023,
arXiv:2304.07718). Draw B bootstrap samples of the training set and fit a weak learner f_b to each.
With w_bi the number of times that sample b holds example i,

    ψ_i = Σ_b 1[w_bi = 0] 1[f_b(x_i) = y_i] / Σ_b 1[w_bi = 0],

the out-of-bag accuracy at i: low where the rest of the data contradict the label. It is a value of
the example's own label and has no notion of a query, so it serves ``self`` only, where *high* is
suspicious: the score is 1 − ψ_i.

Choices: scikit-learn's bagging of decision trees, as in the paper, on the *inputs* (flattened,
projected on their leading principal components), so that nothing of the network is in it; the
authors take features of a pretrained network. The trees follow the run seed. A tree sorts each
component of n examples, so the cost grows as B n log n: with 32 components and a fifth of the
labels flipped 0.12 s of CPU a tree at 4,000 examples and 0.67 s at 16,000.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from baselines.controls import _SelfControl
from fine_bench.estimator import Schedule
from fine_bench.gradients.margin import classification_reason
from fine_bench.seeds import derive
from fine_bench.types import InfluenceScores, Problem


class DataOOB(_SelfControl):
    """One minus the out-of-bag accuracy of bagged trees at each example, in [0, 1].

    Args:
        n_trees: B, at least 1. An example is out of a bag with probability 0.37.
        components: principal components of the inputs that the trees see, ≥ 1; all of them where
            there are fewer.
        max_train: refused beyond this number of examples, which takes most of an hour.
        seed: of the bags, ≥ 0; the run seed in the benchmark.
    """

    name = "data_oob"
    version = 1
    schedule = Schedule.LAST

    def __init__(
        self, n_trees: int = 400, components: int = 32, max_train: int = 100_000, seed: int = 0
    ) -> None:
        for what, value in (("n_trees", n_trees), ("components", components)):
            if value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}")
        self.n_trees, self.components = n_trees, components
        self.max_train, self.seed = max_train, seed

    def unsupported(self, problem: Problem) -> str | None:
        """Only ``self``, with labels of classes, real-valued inputs and not too many examples."""
        reason = super().unsupported(problem) or classification_reason(problem)
        if reason is not None:
            return reason
        if problem.n_train > self.max_train:
            return (
                f"{problem.n_train:,} examples are more than max_train={self.max_train:,}; "
                f"{self.n_trees} trees on them take long. Raise max_train to wait for them"
            )
        _, x, _ = next(iter(problem.batches("train", batch_size=1)))
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            return f"needs real-valued inputs, on which trees are grown, got {what}"
        return None

    def compute(self) -> InfluenceScores:
        """The shares of trees that are wrong."""
        from sklearn.decomposition import PCA
        from sklearn.ensemble import BaggingClassifier

        self.require_update()
        x = torch.cat([x.flatten(1) for _, x, _ in self.problem.batches("train")]).double().numpy()
        y = self.problem.labels("train").numpy()
        if x.shape[1] > self.components and len(x) > self.components:
            x = PCA(self.components, svd_solver="covariance_eigh").fit_transform(x)
        state = derive(self.seed, "control/data_oob") % 2**32
        bags = BaggingClassifier(n_estimators=self.n_trees, random_state=state).fit(x, y)
        right, out = np.zeros(len(x)), np.zeros(len(x))
        for tree, seen in zip(bags.estimators_, bags.estimators_samples_, strict=True):
            away = np.ones(len(x), dtype=np.bool_)
            away[seen] = False
            if away.any():
                # the trees count classes from 0
                right[away] += bags.classes_[tree.predict(x[away]).astype(int)] == y[away]
                out += away
        if (out == 0).any():
            raise ValueError(
                f"{int((out == 0).sum())} examples are in the bags of all {self.n_trees} trees; "
                "raise n_trees"
            )
        dtype = next(self.model.parameters()).dtype
        return self._scores(torch.from_numpy(1.0 - right / out).to(dtype)[None])
