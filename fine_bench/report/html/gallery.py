"""The examples with the largest scores: which ones, and what is known of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fine_bench.leaderboard.consistency import LEVEL
from fine_bench.leaderboard.tables import Row
from fine_bench.metrics.intervals import Interval, mean_interval
from fine_bench.report.figures.tables import TableResults, kind_of
from fine_bench.retraining.truth import Truth
from fine_bench.types import InfluenceScores

F_INE = ("f-INE", "f-INE (paper)")

CORRELATED_SINCE = "2026-11-27"
"""Day from which a group's interval knows that samples of neighbouring steps go together. Those of
older records took them as independent and hold far less often than they say, so they are not shown.
"""


@dataclass(frozen=True)
class RetrainedMu:
    """What retraining shows of an example: μ of its own margin, published half.

    Attributes:
        mu, std_error: of the truth.
        rank: 1 for the largest |μ| of all ``n`` examples.
        n: number of examples.
    """

    mu: float
    std_error: float
    rank: int
    n: int


@dataclass(frozen=True)
class ShownExample:
    """One training example of a gallery.

    Attributes:
        index: position in the training set.
        score: mean over seeds with its interval.
        n_seeds: number of seeds.
        planted: whether it was made bad; None where nobody knows.
        p_values: by seed, where the method stores them.
        one_run: interval within one run by seed, where the method stores it.
        truth: what retraining shows, where a ground truth exists.
    """

    index: int
    score: Interval
    n_seeds: int
    planted: bool | None
    p_values: Mapping[int, float] = field(default_factory=dict)
    one_run: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    truth: RetrainedMu | None = None


def rows_shown(results: TableResults, target: str, wanted: Sequence[str] = ()) -> list[Row]:
    """Rows whose largest scores are shown: those named, else one of each kind of f-INE.

    Among f-INE rows the one called ``fine`` goes first, then the newest. Rows that score groups
    alone are shown besides, for their groups. A task without f-INE shows its best row that is no
    mere control, or its best row.
    """
    rows = results.rows(target)
    if wanted:
        return [row for row in rows if row.estimator in wanted]

    def kind(row: Row) -> tuple[str, bool]:
        found = kind_of(row.estimator, results.record(row, row.seeds[0]).config)
        return found.family, found.control

    chosen = []
    for family in F_INE:
        mine = [row for row in rows if kind(row)[0] == family and row.watched != 0]
        if mine:
            newest = max(mine, key=lambda r: (r.estimator == "fine", results.newest(r)))
            chosen.append(newest)
    chosen += [row for row in rows if row.watched == 0]
    if chosen or not rows:
        return chosen
    return [next((row for row in rows if not kind(row)[1]), rows[0])]


def largest_examples(
    results: TableResults, row: Row, count: int, truth: Truth | None
) -> list[ShownExample]:
    """The ``count`` examples of a row with the largest |mean score over seeds|, largest first.

    Several rows of scores (queries, classes) are averaged, as for detection. An example that only
    some seeds scored is left out.
    """
    found = {
        seed: scores for seed in row.seeds if (scores := results.scores(row, seed)) is not None
    }
    if not found:
        return []
    some = [_watched(scores) for scores in found.values()]
    common = some[0]
    for other in some[1:]:
        common = np.intersect1d(common, other)
    values = np.stack([s.values.double().mean(dim=0).numpy()[common] for s in found.values()])
    mean = values.mean(axis=0)
    order = np.argsort(-np.abs(mean), kind="stable")[:count]
    bad = results.truth(row, next(iter(found)))
    shown = []
    for i in order.tolist():
        example = int(common[i])
        by_seed = dict(zip(found, values[:, i].tolist(), strict=True))
        shown.append(
            ShownExample(
                example,
                mean_interval(by_seed, LEVEL),
                len(found),
                None if bad is None else bool(bad[example]),
                _p_values(found, example),
                _intervals(found, example),
                None if truth is None else _retraining(truth, example),
            )
        )
    return shown


def _watched(scores: InfluenceScores) -> NDArray[np.int64]:
    if scores.watched is None:
        return np.arange(scores.values.shape[1])
    return scores.watched.numpy()


def _extra(scores: InfluenceScores, name: str, example: int) -> float | None:
    """An extra of an example: ``(n_watched,)``, ``(n_train,)`` or ``(1, n_train)``."""
    tensor = scores.extras.get(name)
    if tensor is None:
        return None
    flat = tensor.reshape(-1)
    if scores.watched is not None and len(flat) == len(scores.watched):
        place = int(np.searchsorted(scores.watched.numpy(), example))
        return float(flat[place])
    return float(flat[example]) if len(flat) == scores.values.shape[1] else None


def _p_values(found: Mapping[int, InfluenceScores], example: int) -> dict[int, float]:
    values = {seed: _extra(scores, "p_value", example) for seed, scores in found.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def _intervals(
    found: Mapping[int, InfluenceScores], example: int
) -> dict[int, tuple[float, float]]:
    ends = {}
    for seed, scores in found.items():
        low, high = _extra(scores, "lower", example), _extra(scores, "upper", example)
        if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
            ends[seed] = (low, high)
    return ends


def _retraining(truth: Truth, example: int) -> RetrainedMu:
    half = truth.published
    size = np.abs(half.mu_margin)
    return RetrainedMu(
        float(half.mu_margin[example]),
        float(half.mu_margin_se[example]),
        1 + int((size > size[example]).sum()),
        truth.n_train,
    )


@dataclass(frozen=True)
class GroupLine:
    """The paper's estimate for a group of examples in one run.

    The ends are NaN where the record is older than ``CORRELATED_SINCE`` (``old``).
    """

    name: str
    seed: int
    size: int
    mu: float
    lower: float
    upper: float
    p_value: float
    run_level: float
    old: bool = False


def group_lines(results: TableResults, row: Row) -> list[GroupLine]:
    """Groups that a row's records hold (metrics ``group/<name>/…``), by name and seed."""
    lines = []
    for seed in row.seeds:
        record = results.record(row, seed)
        metrics, old = record.metrics, record.created[:10] < CORRELATED_SINCE
        names = {key.split("/")[1] for key in metrics if key.startswith("group/")}
        for name in names:
            m = {k: metrics.get(f"group/{name}/{k}", math.nan)
                 for k in ("mu", "lower", "upper", "p_value", "size", "mu_run")}  # fmt: skip
            size = int(m["size"]) if math.isfinite(m["size"]) else 0
            low, high = (math.nan, math.nan) if old else (m["lower"], m["upper"])
            lines.append(
                GroupLine(name, seed, size, m["mu"], low, high, m["p_value"], m["mu_run"], old)
            )
    return sorted(lines, key=lambda line: (line.name, line.seed))
