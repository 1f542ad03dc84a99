"""What retraining itself says, scored as if it were a method: the limit beside the tables.

A faithful influence score cannot find bad examples better than influence itself does. So every
table of a task with a ground truth shows, apart from the methods and never ranked with them:

- ``retraining_mu``: μ of each example's own margin (``self``).
- ``retraining_effect``: the mean margin with the example minus without, ``self``. It is Data
  Banzhaf of the example's own margin by maximum sample reuse; ``metrics.retraining.effect`` derives
  it.
- ``retraining_out_of_sample``: minus the mean margin of the models that never saw it, ``self``.
- ``retraining_banzhaf``: Data Banzhaf for the mean margin of the task's queries, ``validation``,
  from the subsets of the linear datamodeling score. They are tens, not hundreds, so it is noisy:
  the label says how many. Of so few that an example is in all of them or in none there is no row:
  nothing was compared for it.

All are taken from the *development* half of the models and compared with the published half, as any
method is: nothing is scored by itself. They cost hundreds of trainings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fine_bench.metrics.limits import Limit
from fine_bench.metrics.registry import Given, measure
from fine_bench.metrics.retraining import effect
from fine_bench.retraining.truth import HalfTruth, SubsetTruth, Truth
from fine_bench.retraining.truth_files import find, folders
from fine_bench.types import SUSPICIOUS_END, Target

Limits: TypeAlias = Callable[[str, str], Sequence[Limit]]
"""From the digests of data and setting to what retraining says of them."""


def limits_in(results: Path | str | None) -> Limits:
    """The limits of every setting that has a ground truth below ``results`` or in the project."""

    @functools.cache
    def of(data_sha256: str, setting: str) -> Sequence[Limit]:
        truth = find(folders(results), data_sha256, setting)
        return () if truth is None else limits_of(truth)

    return of


def limits_of(truth: Truth) -> list[Limit]:
    """The oracle rows of a ground truth, measured as methods are."""
    half = truth.development
    models = f"{half.n_models} models"
    found = [
        _limit(truth, name, models, "self", values) for name, values in self_scores(half).items()
    ]
    if truth.subsets is not None:
        values = validation_banzhaf(truth.subsets)
        n_subsets = len(truth.subsets.members[truth.subsets.of("development")])
        made_of = f"{n_subsets} subsets"
        if np.isfinite(values).all():
            found.append(_limit(truth, "retraining_banzhaf", made_of, "validation", values))
    return found


def self_scores(half: HalfTruth) -> dict[str, NDArray[Any]]:
    """Scores ``(n,)`` of the target ``self`` by name; high is suspicious."""
    return {
        "retraining_mu": half.mu_margin,
        "retraining_effect": half.effect_margin,
        "retraining_out_of_sample": -half.out_of_sample_margin,
    }


def validation_banzhaf(subsets: SubsetTruth) -> NDArray[Any]:
    """Data Banzhaf ``(n,)`` for the mean margin of the queries; positive where an example helps.

    Of the development half of the subsets, each with the mean over its seeds and queries as
    utility; see ``metrics.retraining.effect``. NaN for an example in all subsets or in none.
    """
    own = subsets.of("development")
    members = subsets.members[own]
    utility = subsets.margin[own].astype(np.float64).mean(axis=1)
    return effect(members, np.repeat(utility[:, None], members.shape[1], axis=1))


def _limit(truth: Truth, name: str, made_of: str, target: Target, values: NDArray[Any]) -> Limit:
    scores = np.asarray(values, dtype=np.float64)[None]
    given = Given(
        values=torch.from_numpy(scores),
        target=target,
        end=SUSPICIOUS_END[target],
        is_bad=torch.from_numpy(truth.is_bad),
    )
    numbers = measure(given) | truth.metrics(scores, target, "published")
    return Limit(name, made_of, target, numbers)
