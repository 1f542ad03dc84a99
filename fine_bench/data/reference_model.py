"""A simple model that knows nothing of the benchmarked runs: which images are hard, and like what.

Multinomial logistic regression on pixels, fitted on a part of the pool that is set aside for it: no
run trains on these images, and it has seen none of the task's. Its objective is strictly convex
and solved to a tight tolerance, so that the result does not hang on the order of additions.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fine_bench.data.sampling import random_order
from fine_bench.data.source import Source, check_seed
from fine_bench.errors import ConfigError

INVERSE_PENALTY = 0.01
TOLERANCE = 1e-9
MAX_ITERATIONS = 5_000


def set_aside(source: Source, n_model: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the pool for the simple model, and of the others, both ascending.

    Args:
        source: the clean data.
        n_model: how many for the model: a uniform draw; more contain the fewer.
        seed: ``task.seed``.

    Raises:
        ConfigError: a number that leaves a class out of the model's part, or too few others.
    """
    check_seed(seed)
    n_pool, n_classes = len(source.labels), source.n_classes
    if not n_classes <= n_model <= n_pool - n_classes:
        raise ConfigError(
            f"task.n_model={n_model} images are set aside for the simple model out of {n_pool}; "
            f"type a number from {n_classes} to {n_pool - n_classes}, for instance "
            f"task.n_model={n_pool // 5}"
        )
    order = random_order(n_pool, seed, "task/model")
    model, others = order[:n_model].sort().values, order[n_model:].sort().values
    absent = set(range(n_classes)) - set(source.labels[model.numpy()].tolist())
    if absent:
        raise ConfigError(
            f"task.n_model={n_model} images are too few for the simple model: none of them is of "
            f"class {min(absent)}. Type for instance task.n_model={n_pool // 5}"
        )
    return model, others


def class_probabilities(source: Source, model: Tensor, x: Tensor) -> Tensor:
    """The simple model's probabilities for other images, ``(n, n_classes)`` float64.

    Args:
        source: the clean data.
        model: positions of the pool that it is fitted on; every class occurs.
        x: ``(n, ...)`` inputs.
    """
    chosen = model.numpy()
    inputs = source.to_input(source.images[chosen]).flatten(1).double().numpy()
    regression = LogisticRegression(C=INVERSE_PENALTY, tol=TOLERANCE, max_iter=MAX_ITERATIONS)
    regression.fit(inputs, source.labels[chosen])
    found = regression.predict_proba(x.flatten(1).double().numpy())
    return torch.from_numpy(np.ascontiguousarray(found))
