"""Does leaving out the flagged rows help? Retraining with and without them, side by side.

Each of the seeds holds out a fifth of the rows, class by class, and trains two models on the rest:
one on all of it, one without the flagged rows. Both are measured on the held-out rows by their
given labels, of which some are wrong: they cost both models alike, so that the difference is what
counts. Where rows are trusted, the held-out ones among them are measured too. The rows were flagged
by runs that saw all of them, the held-out ones included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from fine_bench.runner.clean.recipe import Recipe
from fine_bench.runner.clean.training import train_model
from fine_bench.seeds import derive

SEEDS = 5
HELD_OUT = 5
"""One row in so many is held out."""
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Check:
    """Accuracies of both models, one entry a seed.

    Attributes:
        before, after: ``(seeds,)`` accuracy on held-out rows, trained with and without the flagged.
        trusted_before, trusted_after: the same on held-out trusted rows; empty without any.
        removed: mean number of rows left out.
    """

    before: NDArray[np.float64]
    after: NDArray[np.float64]
    trusted_before: NDArray[np.float64]
    trusted_after: NDArray[np.float64]
    removed: float

    def lines(self) -> list[str]:
        """The result in sentences."""
        said = [_sentence("held-out rows (given labels)", self.before, self.after)]
        if len(self.trusted_before):
            said.append(_sentence("held-out trusted rows", self.trusted_before, self.trusted_after))
        return said


def difference(
    before: NDArray[np.float64], after: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Mean of ``after − before`` with its 95 % interval, Student's t over the seeds."""
    change = after - before
    mean = float(change.mean())
    if len(change) < 2:
        return mean, float("nan"), float("nan")
    quantile = float(stdtrit(len(change) - 1, 0.5 + CONFIDENCE / 2))
    half = quantile * float(change.std(ddof=1)) / np.sqrt(len(change))
    return mean, mean - half, mean + half


def _sentence(where: str, before: NDArray[np.float64], after: NDArray[np.float64]) -> str:
    mean, low, high = difference(before, after)
    verdict = "helps" if low > 0 else "hurts" if high < 0 else "makes no measurable difference"
    return (
        f"accuracy on {where}: {before.mean():.1%} with the flagged rows, {after.mean():.1%} "
        f"without; difference {100 * mean:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}], "
        f"{len(before)} seeds: leaving them out {verdict}"
    )


def check(
    x: Tensor,
    y: Tensor,
    n_classes: int,
    flagged: NDArray[np.bool_],
    trusted: NDArray[np.bool_] | None,
    recipe: Recipe,
    *,
    seed: int,
    seeds: int = SEEDS,
    advance: Callable[[], None] = lambda: None,
) -> Check:
    """Retrain; deterministic in ``seed``.

    Args:
        x, y, n_classes, recipe: as in ``training.train_run``.
        flagged: ``(n,)`` what is left out.
        trusted: ``(n,)``, or None.
        seed: of splits and trainings.
        seeds: number of splits.
        advance: called after each epoch.
    """
    found: dict[str, list[float]] = {"before": [], "after": [], "tb": [], "ta": []}
    removed: list[int] = []
    labels = y.numpy()
    for number in range(seeds):
        held = held_out(labels, derive(seed, f"clean/check/{number}"))
        rest = np.flatnonzero(~held)
        removed.append(int(flagged[rest].sum()))
        for key, rows in (("before", rest), ("after", rest[~flagged[rest]])):
            run = train_model(
                x, y, n_classes, rows, recipe,
                seed=derive(seed, f"clean/check/{number}"), influence=False, advance=advance,
            )  # fmt: skip
            right = run.probabilities.argmax(axis=1) == labels
            found[key].append(float(right[held].mean()))
            if trusted is not None and (trusted & held).any():
                found["tb" if key == "before" else "ta"].append(float(right[trusted & held].mean()))
    arrays = {key: np.array(values) for key, values in found.items()}
    # a split without a trusted row says nothing of them, and a mean over the others would mislead
    whole = len(arrays["tb"]) == seeds
    none = np.zeros(0)
    return Check(
        arrays["before"],
        arrays["after"],
        arrays["tb"] if whole else none,
        arrays["ta"] if whole else none,
        float(np.mean(removed)),
    )


def held_out(y: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """One row in five of each class, ``(n,)``; a class of fewer gives none, or one by chance."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(len(y), dtype=np.bool_)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        mask[rows[: (len(rows) + int(rng.integers(HELD_OUT))) // HELD_OUT]] = True
    if not mask.any():
        mask[rng.integers(len(y))] = True
    return mask
