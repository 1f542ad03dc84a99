"""Cure: does acting on the scores make a better model? What ``fine-bench cure`` runs.

For each method the k most suspicious training examples are removed, relabelled or given less
weight, and the model is trained again with fresh run seeds. ``remove_best`` removes from the other
end, the least suspicious first. The test accuracy against the number
touched stands beside the oracle (the bad examples first) and a random order. A flag
that is right need not help: this measures whether it does.

Language models are cured within the run, as a metric of a cell: ``backends.language_cure``. Both
take their orders from ``cure_orders``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from fine_bench.metrics.cure import BEST_FIRST, ORACLE, RANDOM, CurePoint
from fine_bench.metrics.intervals import mean_interval
from fine_bench.runner.backends.images import images_of
from fine_bench.runner.cure_orders import Order, oracle_order, order_of, random_order
from fine_bench.runner.plan import Job
from fine_bench.runner.retrain import MeanProbabilities, Retrain, mean_probabilities, retrain
from fine_bench.types import InfluenceScores

Treatment: TypeAlias = Literal["remove", "relabel", "downweight", "remove_best"]

TREATMENTS: tuple[Treatment, ...] = get_args(Treatment)
USUAL = TREATMENTS[:3]
"""Those that are tried where nothing is said."""
MIN_SEEDS = 5
FIRST_SEED = 1000
"""Retraining seeds count from here, away from those of the runs that were scored."""
_AT_ONCE = 64


def guesses(probabilities: Tensor, y: Tensor) -> Tensor:
    """The most probable class besides the given one, ``(n,)``; see ``mean_probabilities``."""
    return probabilities.scatter(1, y[:, None], -1.0).argmax(1)


def treat(
    treatment: Treatment, rows: Order, y: Tensor, new: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Labels and weights ``(n,)`` after touching ``rows``.

    ``remove`` and ``remove_best``: weight 0. ``relabel``: the label in ``new``. ``downweight``:
    ``weight``.
    """
    labels, weights = y.clone(), torch.ones(len(y))
    touched = torch.from_numpy(rows)
    if treatment == "relabel":
        labels[touched] = new[touched]
    else:
        weights[touched] = weight if treatment == "downweight" else 0.0
    return labels, weights


def cure(
    job: Job,
    scores: Mapping[str, Sequence[InfluenceScores]],
    *,
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.3),
    treatments: Sequence[Treatment] = USUAL,
    n_seeds: int = MIN_SEEDS,
    weight: float = 0.1,
    train: Retrain = retrain,
    probabilities: MeanProbabilities = mean_probabilities,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[CurePoint]:
    """Treat, retrain and compare.

    Retraining seed j uses a method's scores of its (j mod R)-th stored run of R, so that the
    interval holds what other runs would have said of the data too. The new label of a relabelled
    example is the most probable class besides the given one, by the mean probability over the
    epochs of the untreated model with the same seed: no held-out fold, one run that saw the given
    labels. The oracle knows the right labels as well, which no method does.

    Args:
        job: task, model and recipe.
        scores: method → scores of one or more runs, of all training examples.
        shares: of the training set to touch, in (0, 1).
        treatments: some of ``TREATMENTS``.
        n_seeds: retraining seeds, at least 5.
        weight: of a down-weighted example, in (0, 1).
        train, probabilities: how models are trained; both may be replaced by faster ones.
        advance: told how many of how many models are done.

    Raises:
        ValueError: options out of range, or scores that are not of all training examples.
    """
    _check(job, scores, shares, treatments, n_seeds, weight)
    data, n = images_of(job), job.data.n_train
    bad = data.truth.is_bad.numpy()
    seeds = [FIRST_SEED + j for j in range(n_seeds)]
    counts = sorted({max(round(share * n), 1) for share in shares})
    guessed = [
        guesses(probabilities(job, seed), data.y) if "relabel" in treatments else data.y
        for seed in seeds
    ]
    orders: dict[str, list[Order]] = {
        name: [order_of(run, job.end(run.target)) for run in islice(cycle(runs), n_seeds)]
        for name, runs in scores.items()
    }
    orders[ORACLE] = [oracle_order(bad, seed) for seed in seeds]
    orders[RANDOM] = [random_order(n, seed) for seed in seeds]

    tasks: list[tuple[str, str, int, int]] = [("", "none", 0, j) for j in range(n_seeds)]
    tasks += [
        (name, treatment, k, j)
        for name in orders
        for treatment in treatments
        for k in counts
        for j in range(n_seeds)
    ]
    found: dict[tuple[str, str, int], list[float]] = {}
    for start in range(0, len(tasks), _AT_ONCE):
        part = tasks[start : start + _AT_ONCE]
        treated = []
        for name, treatment, k, j in part:
            if name == "":
                treated.append((data.y, torch.ones(n)))
                continue
            new = data.clean_y if name == ORACLE else guessed[j]
            rows = _first(orders[name][j], treatment, k)
            treated.append(treat(_treatment(treatment), rows, data.y, new, weight))
        accuracies = train(
            job,
            torch.stack([labels for labels, _ in treated]),
            torch.stack([weights for _, weights in treated]),
            [seeds[j] for *_, j in part],
        )
        for (name, treatment, k, _), accuracy in zip(part, accuracies, strict=True):
            found.setdefault((name, treatment, k), []).append(accuracy)
        advance(start + len(part), len(tasks))

    plain = found["", "none", 0]
    return [
        CurePoint(
            method=name,
            treatment=treatment,
            touched=k,
            share=k / n,
            bad_touched=(
                float(np.mean([bad[_first(o, treatment, k)].sum() for o in orders[name]]))
                if name
                else 0.0
            ),
            accuracy=mean_interval(dict(zip(seeds, values, strict=True))),
            gain=mean_interval({s: v - p for s, v, p in zip(seeds, values, plain, strict=True)}),
            n_seeds=n_seeds,
            by_seed=dict(zip(seeds, values, strict=True)),
        )
        for (name, treatment, k), values in found.items()
    ]


def _first(order: Order, treatment: str, k: int) -> Order:
    """The k examples that are touched; the suspicious end of an order comes first."""
    return order[::-1][:k].copy() if treatment == BEST_FIRST else order[:k]


def _treatment(name: str) -> Treatment:
    for treatment in TREATMENTS:
        if treatment == name:
            return treatment
    raise ValueError(f"a treatment must be one of {', '.join(TREATMENTS)}, got {name!r}")


def _check(
    job: Job,
    scores: Mapping[str, Sequence[InfluenceScores]],
    shares: Sequence[float],
    treatments: Sequence[str],
    n_seeds: int,
    weight: float,
) -> None:
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(
            f"shares must lie between 0 and 1, got {list(shares)}; try 0.05 0.1 0.2 0.3"
        )
    if not treatments:
        raise ValueError(f"no treatment is chosen; choose from {', '.join(TREATMENTS)}")
    for treatment in treatments:
        _treatment(treatment)
    if n_seeds < MIN_SEEDS:
        raise ValueError(f"at least {MIN_SEEDS} seeds are needed for an interval, got {n_seeds}")
    if not 0 < weight < 1:
        raise ValueError(f"weight must lie between 0 and 1, got {weight}; 0 is remove, try 0.1")
    if ORACLE in scores or RANDOM in scores:
        raise ValueError(f"a method must not be called {ORACLE!r} or {RANDOM!r}; rename its row")
    for name, runs in scores.items():
        if not runs:
            raise ValueError(f"{name} has no scores; leave it out")
        for run in runs:
            if run.values.shape[1] != job.data.n_train or run.watched is not None:
                raise ValueError(
                    f"{name} does not score all {job.data.n_train} training examples; leave it out"
                )
