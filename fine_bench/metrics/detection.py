"""Detection: are the bad training examples at the suspicious end of the scores?

All functions take *suspicion*, ``(n_train,)``, high for suspicious examples; ``suspicion`` makes it
from scores. Which end is suspicious is declared by the target (``types.SUSPICIOUS_END``).

Ties are counted by their expectation: where a tie leaves the order open, AUROC, recall and the
curves are the mean over all orders of the tied examples (average precision lets them enter
together). So a constant score finds exactly the share of bad examples that random guessing finds,
however the examples happen to be stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from fine_bench.metrics._arrays import ArrayLike, Vector, as_vector
from fine_bench.metrics._arrays import suspicion as suspicion
from fine_bench.metrics.registry import DETECTION, Given, Metric, metric

METRICS = (
    Metric("n_bad", "bad examples", unit="examples", table=""),
    Metric("n_watched", "examples scored", unit="examples", table=""),
    Metric("n_known", "examples of known truth", unit="examples", table=""),
)
"""Counts that stand in a record beside its metrics."""


def _checked(
    suspicion: ArrayLike, is_bad: Tensor | NDArray[Any]
) -> tuple[Vector, NDArray[np.bool_]]:
    scores = as_vector(suspicion, "suspicion")
    bad = np.asarray(is_bad.cpu().numpy() if isinstance(is_bad, Tensor) else is_bad)
    if bad.dtype != np.bool_ or bad.shape != scores.shape:
        raise ValueError(
            f"is_bad must be boolean of shape {scores.shape}, got {bad.dtype} of shape {bad.shape}"
        )
    n_bad = int(bad.sum())
    if n_bad in (0, len(bad)):
        some = "no example is bad" if n_bad == 0 else "all examples are bad"
        raise ValueError(
            f"{some}, so detection is undefined; it needs a task with bad and good examples, for "
            "instance task.noise_rate=0.2"
        )
    return scores, bad


def detection_metrics(suspicion: ArrayLike, is_bad: Tensor | NDArray[Any]) -> dict[str, float]:
    """How well the order of suspicion separates bad from good examples.

    With noise rate p = n_bad / n:

    - ``auroc``: P(bad more suspicious than good) + P(tied) / 2.
    - ``average_precision``: Σ_t (recall_t − recall_{t−1}) precision_t over the distinct
      thresholds, tied examples entering together; p for a constant score.
    - ``recall_at_rate``: share of the bad among the n_bad most suspicious. Equal to the precision
      there; 1 is perfect, p is chance.
    - ``recall_curve_area``: area under recall against share inspected (``detection_curve`` at
      every example, trapezoids), which is p/2 + (1 − p)·AUROC: 1/2 is chance, 1 − p/2 perfect.
      The convention of the quanda suite (Bareeva et al., 2024, arXiv 2410.07158).

    Args:
        suspicion: ``(n_train,)``, finite, high for suspicious.
        is_bad: ``(n_train,)`` boolean.

    Raises:
        ValueError: none or all of the examples are bad, wrong shapes, values that are not finite.
    """
    scores, bad = _checked(suspicion, is_bad)
    auroc = float(roc_auc_score(bad, scores))
    rate = float(bad.mean())
    return {
        "auroc": auroc,
        "average_precision": float(average_precision_score(bad, scores)),
        "recall_at_rate": _recall_at(scores, bad, int(bad.sum())),
        "recall_curve_area": rate / 2 + (1 - rate) * auroc,
    }


@metric(
    Metric("auroc", "AUROC", "higher", table=DETECTION, rank=10),
    Metric("average_precision", "avg. precision", "higher", table=DETECTION,
           title="average precision", rank=11),
    Metric("recall_at_rate", "recall@rate", "higher", table=DETECTION, rank=12),
    Metric("recall_curve_area", "curve area", "higher", table=DETECTION, rank=13),
    needs=["bad"],
)  # fmt: skip
def detection(given: Given) -> dict[str, float]:
    """``detection_metrics`` of a run."""
    return detection_metrics(given.suspicion, given.bad)


def _recall_at(scores: Vector, bad: NDArray[np.bool_], k: int) -> float:
    """Expected recall among the k most suspicious under random tie-breaking."""
    cut = np.partition(scores, len(scores) - k)[len(scores) - k]
    above, tied = scores > cut, scores == cut
    n_tied = int(tied.sum())
    sure = int((bad & above).sum())
    # each tied example is taken with probability (k - n_above) / n_tied; integers up to the one
    # division, so that a constant score gets the noise rate to the last bit
    drawn = (k - int(above.sum())) * int((bad & tied).sum())
    return (sure * n_tied + drawn) / (n_tied * int(bad.sum()))


def detection_curve(
    suspicion: ArrayLike, is_bad: Tensor | NDArray[Any], n_points: int = 101
) -> tuple[Vector, Vector]:
    """Share of the bad examples found against share of all examples inspected.

    Examples are inspected from the most suspicious on. Within a tie the expected recall grows
    linearly; a share that falls between two examples is interpolated.

    Args:
        suspicion: ``(n_train,)``, finite, high for suspicious.
        is_bad: ``(n_train,)`` boolean.
        n_points: points of the curve, equally spaced from 0 to 1, at least 2.

    Returns:
        share inspected and recall, ``(n_points,)`` each.
    """
    if n_points < 2:
        raise ValueError(f"n_points must be at least 2, got {n_points}")
    scores, bad = _checked(suspicion, is_bad)
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    # the last example of every run of equal scores: only there is the count certain
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    inspected = np.concatenate([[0.0], (last + 1) / len(scores)])
    found = np.concatenate([[0.0], np.cumsum(bad[order])[last] / bad.sum()])
    share = np.linspace(0.0, 1.0, n_points)
    return share, np.interp(share, inspected, found)
