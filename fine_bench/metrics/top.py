"""What a person who inspects the top of a list finds.

All functions take *suspicion* ``(n_train,)``, high for suspicious, as ``metrics.detection`` does;
where a tie crosses the cut, the number found is its expectation over all orders of the tied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.metrics._arrays import ArrayLike, as_vector
from fine_bench.metrics.registry import Given, Metric, metric

TOP = "top of the list, and spread over runs"


def found_in_top(suspicion: ArrayLike, is_bad: Tensor | NDArray[Any], k: int) -> float:
    """Expected number of bad examples among the k most suspicious.

    Args:
        suspicion: ``(n_train,)``, finite.
        is_bad: ``(n_train,)`` boolean.
        k: from 1 to n_train.
    """
    scores = as_vector(suspicion, "suspicion")
    bad = np.asarray(is_bad.cpu().numpy() if isinstance(is_bad, Tensor) else is_bad)
    if bad.dtype != np.bool_ or bad.shape != scores.shape:
        raise ValueError(
            f"is_bad must be boolean of shape {scores.shape}, got {bad.dtype} of shape {bad.shape}"
        )
    if not 1 <= k <= len(scores):
        raise ValueError(f"k must be from 1 to the number of examples, {len(scores)}; got {k}")
    cut = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, tied = scores > cut, scores == cut
    places = k - int(above.sum())
    return float((bad & above).sum() + places * (bad & tied).sum() / tied.sum())


def top_metrics(
    suspicion: ArrayLike,
    is_bad: Tensor | NDArray[Any],
    *,
    shares: tuple[float, ...] = (0.2,),
    sizes: tuple[int, ...] = (10, 20, 50),
) -> dict[str, float]:
    """Recall in the top shares and precision at fixed sizes.

    - ``recall_top_20``: share of the bad among the 20 % most suspicious (for each of ``shares``).
    - ``precision_at_10``: share of bad ones among the 10 most suspicious (for each of ``sizes``
      below n_train).

    Args:
        suspicion: ``(n_train,)``, finite, high for suspicious.
        is_bad: ``(n_train,)`` boolean, at least one True.
        shares: of the training set, in (0, 1].
        sizes: numbers of examples.
    """
    scores = as_vector(suspicion, "suspicion")
    n, n_bad = len(scores), int(np.asarray(is_bad).sum())
    if n_bad == 0:
        raise ValueError("no example is bad, so there is nothing to find; leave these metrics out")
    result = {
        f"recall_top_{100 * share:g}": found_in_top(scores, is_bad, max(1, round(share * n)))
        / n_bad
        for share in shares
    }
    for k in sizes:
        if k < n:
            result[f"precision_at_{k}"] = found_in_top(scores, is_bad, k) / k
    return result


@metric(
    Metric("recall_top_20", "recall in top 20 %", "higher", table=TOP, rank=30),
    Metric("precision_at_10", "precision@10", "higher", table=TOP, rank=31),
    Metric("precision_at_20", "precision@20", "higher", table=TOP, rank=32),
    Metric("precision_at_50", "precision@50", "higher", table=TOP, rank=33),
    needs=["bad", "language"],
)
def top(given: Given) -> dict[str, float]:
    """``top_metrics`` of a run of a language task, whose sources are few and inspected by hand."""
    return top_metrics(given.suspicion, given.bad)
