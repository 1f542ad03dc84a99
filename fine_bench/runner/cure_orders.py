"""In which order a cure touches the training examples: as a method, an oracle or chance has it.

Shared by the command ``cure``, which trains models of images again, and by the metrics of the same
name, for which a language model is tuned again.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fine_bench.metrics.detection import suspicion
from fine_bench.seeds import derive
from fine_bench.types import End, InfluenceScores

Order: TypeAlias = NDArray[np.int64]


def order_of(scores: InfluenceScores, end: End) -> Order:
    """All examples, the most suspicious first; ties in index order.

    Args:
        scores: of all training examples.
        end: the suspicious end of the scores.
    """
    return suspicious_first(suspicion(scores.values, end))


def suspicious_first(row: NDArray[np.float64]) -> Order:
    """All examples by suspicion ``(n,)``, the highest first; ties in index order."""
    return np.asarray(np.argsort(-row, kind="stable"), dtype=np.int64)


def bad_first(shuffled: Order, is_bad: NDArray[np.bool_]) -> Order:
    """The bad examples in the order given, then the good ones."""
    return shuffled[np.argsort(~is_bad[shuffled], kind="stable")]


def oracle_order(is_bad: NDArray[np.bool_], seed: int) -> Order:
    """The bad examples in random order, then the good ones."""
    return bad_first(random_order(len(is_bad), seed), is_bad)


def random_order(n: int, seed: int) -> Order:
    """A uniformly random order."""
    return np.random.default_rng(derive(seed, "cure/order")).permutation(n)
