"""From runs to a line for each row: score, rank, agreement of the runs, μ with interval, p-value.

*Doubt*, the default score of a row with label y, from the probabilities p̄ = 0.7 · of models that
have not seen the row + 0.3 · of models that were trained on it, each averaged over the runs:

    doubt = ½ log max_{k≠y} p̄_k − log p̄_y,       in nats, high is suspicious.

It is the mean of two known scores: the surprise −log p̄_y, which ranks as self-confidence does
(Northcutt, Jiang, Chuang 2021) and is best where people err because a row is hard, and the log-odds
log p̄_k/p̄_y of the best other class, the margin of the logits, best where labels are flipped to the
class that looks alike. What a model says of a row that it is trained on adds to what another says
that has not seen it. On development data (other draws and rows than those of the table: wines,
diabetes patients, digits, simulated tables, texts, MNIST with two kinds of flips) a weight of 0.3
had the highest average precision among 0, 0.2, …, 0.5 on average, and on none more than 0.001 less
than self-confidence of five-fold cross-validation, three runs against five folds.
``benchmarks/clean_against_cleanlab.py`` makes the table.

Which words count of a model on its own rows, and how many folds a run has, is the recipe's. On
4,000 development rows of CIFAR-10N with ``gn_cnn`` the average precision of doubt was, with two
folds and the words in passing (mean over the epochs), 0.300, 0.311, 0.316 for 1, 2, 3 runs; with
those of the best epoch 0.319, 0.336, 0.343 (weights of 0.2 to 0.5 differ by 0.006 at most); one run
of three folds, for the work of two of two, 0.341 in passing and 0.353 at the best epoch. Flips at
random are found as well: CIFAR-10 0.593 for 0.589 in passing, MNIST 0.979 for 0.977 (``gn_cnn``,
one run of two folds). Where rows are learnt by heart, the best epoch says less: texts 0.643 for
0.660, MNIST with uniform flips and one hidden layer 0.941 for 0.952 (three runs).

How many rows of a run are *suspects* follows from the run's own probabilities, by the rule of
confident learning: class k is confident in a row when p_k reaches the mean of p_k over the rows
that are labelled k, and a row counts whose most probable confident class is not its label. The
run's suspects are so many rows, those with the highest scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from fine_bench.errors import ConfigError
from fine_bench.metrics.error_rate import Flags
from fine_bench.runner.clean.inputs.items import Items
from fine_bench.runner.clean.training import Floats, Run, joined

Score: TypeAlias = Literal["doubt", "p_label", "margin", "mu"]
SCORES: tuple[Score, ...] = get_args(Score)
MEANING: dict[Score, str] = {
    "doubt": "how surprising the label is and how much likelier another, unseen and in training",
    "p_label": "1 − probability of the given label, out of sample",
    "margin": "by how much another label is more probable, out of sample",
    "mu": "f-INE: how strongly training on the row moved its own prediction",
}
OWN = 0.3
"""Weight of what models say of rows that they were trained on."""
CONFIDENCE = 0.95
LEAST = 1e-12
"""Smaller probabilities count as this one."""


def blended(run: Run) -> Floats:
    """Out of sample with ``OWN`` of what was said of own rows, where it was, ``(n, K)``."""
    both = (1.0 - OWN) * run.probabilities + OWN * run.own
    return np.where(np.isnan(run.own), run.probabilities, both)


def best_other(p: Floats, y: NDArray[np.int64]) -> NDArray[np.int64]:
    """The most probable class besides the given one, ``(n,)``."""
    others = p.copy()
    others[np.arange(len(y)), y] = -np.inf
    return np.asarray(others.argmax(axis=1), dtype=np.int64)


def score_of(run: Run, y: NDArray[np.int64], score: Score) -> Floats:
    """Scores ``(n,)`` of one run, or of several that are ``joined``; high is suspicious.

    Rows without μ get the median of the others for ``"mu"``: nothing is known of them.

    Raises:
        ConfigError: μ was not measured.
    """
    rows = np.arange(len(y))
    if score == "mu":
        if np.isnan(run.mu).all():
            raise ConfigError(
                "--score mu needs f-INE, which was not measured"
                + (f": {run.trouble}" if run.trouble else "")
                + "; use --score doubt"
            )
        return np.where(np.isnan(run.mu), np.nanmedian(run.mu), run.mu)
    p = blended(run) if score == "doubt" else run.probabilities
    own, other = p[rows, y], p[rows, best_other(p, y)]
    if score == "doubt":
        return np.asarray(0.5 * np.log(np.maximum(other, LEAST)) - np.log(np.maximum(own, LEAST)))
    return np.asarray(1.0 - own if score == "p_label" else other - own)


def n_suspects(p: Floats, y: NDArray[np.int64]) -> int:
    """Rows whose most probable confident class is not their label; see the module."""
    n_classes = p.shape[1]
    known = np.bincount(y, minlength=n_classes)
    own = p[np.arange(len(y)), y]
    total = np.bincount(y, weights=own, minlength=n_classes)
    threshold = np.where(known > 0, total / np.maximum(known, 1), np.inf)
    confident = np.where(p >= threshold, p, -1.0)
    return int(((confident.max(axis=1) > 0) & (confident.argmax(axis=1) != y)).sum())


def suspects(run: Run, y: NDArray[np.int64], score: Score) -> NDArray[np.bool_]:
    """The suspects of one run, ``(n,)``."""
    mask = np.zeros(len(y), dtype=np.bool_)
    values = score_of(run, y, score)
    k = n_suspects(run.probabilities, y)
    mask[np.lexsort((np.arange(len(y)), -values))[:k]] = True
    return mask


def mu_interval(runs: Sequence[Run]) -> tuple[Floats, Floats, Floats]:
    """``interval_over_runs`` of the μ that runs have measured."""
    return interval_over_runs(
        np.stack([run.mu for run in runs]), np.stack([run.std_error for run in runs])
    )


def interval_over_runs(mu: Floats, error: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean μ over the runs with the ends of its 95 % interval, each ``(n,)``.

    Args:
        mu: ``(runs, n)``; NaN for a row that a run held out.
        error: its standard errors, of the same shape; NaN or infinite where a run saw too little of
            the row, which has no interval then and no part in c.

    A run's own standard errors say how uncertain rows are beside each other. How far runs differ in
    all is seen between them: with s_i² the variance of row i's μ over its runs and e_i² the mean of
    its squared standard errors, all are scaled by c² = Σ s_i² / Σ e_i², over rows with two runs, so
    that they agree on average. The interval is μ̄_i ± 1.96 c e_i / √(runs of row i). With one run
    c = 1. NaN for a row that was held out in every run.
    """
    known = ~np.isnan(mu)
    count = known.sum(axis=0)
    safe = np.maximum(count, 1)
    mean = np.where(known, mu, 0.0).sum(axis=0) / safe
    square = np.where(known, error, 0.0) ** 2
    within = square.sum(axis=0) / safe
    several = (count >= 2) & np.isfinite(within)
    spread = np.where(known, (mu - mean) ** 2, 0.0).sum(axis=0) / np.maximum(count - 1, 1)
    scale = 1.0
    if several.any() and within[several].sum() > 0:
        scale = float(spread[several].sum() / within[several].sum())
    half = norm.ppf(0.5 + CONFIDENCE / 2) * np.sqrt(scale * within / safe)
    nothing = count == 0
    half = np.where(np.isfinite(half) & (within != 0), half, np.nan)
    return tuple(np.where(nothing, np.nan, a) for a in (mean, mean - half, mean + half))  # type: ignore[return-value]


def ranking(items: Items, runs: Sequence[Run], score: Score, flags: Flags | None) -> pd.DataFrame:
    """A line for each item, the most suspicious first.

    Columns: ``row`` (of the source, from 0), ``name``, ``label``, ``suggested`` (the most probable
    other label), ``score``, ``rank`` (from 1), ``runs_found`` of ``runs``, ``p_label`` (out of
    sample, mean over the runs), ``mu``, ``mu_low``, ``mu_high``; with ``flags`` also ``trusted``,
    ``p_value`` and ``covered``: whether the error rate covers flagging the row.
    """
    y = items.y
    whole = joined(list(runs))
    values = score_of(whole, y, score)
    mean, low, high = mu_interval(runs)
    found = np.sum([suspects(run, y, score) for run in runs], axis=0)
    table = pd.DataFrame(
        {
            "row": items.rows,
            "name": list(items.names),
            "label": items.labels,
            "suggested": [items.classes[k] for k in best_other(blended(whole), y)],
            "score": values,
            "rank": 0,
            "runs_found": found,
            "runs": len(runs),
            "p_label": whole.probabilities[np.arange(len(y)), y],
            "mu": mean,
            "mu_low": low,
            "mu_high": high,
        }
    )
    if flags is not None:
        table["trusted"] = flags.trusted
        table["p_value"] = flags.p_values
        table["covered"] = flags.flagged
    table = table.iloc[np.lexsort((items.rows, -values))].reset_index(drop=True)
    table["rank"] = np.arange(1, len(table) + 1)
    return table


def suspected(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a ranking that most of its runs suspect."""
    return table[2 * table["runs_found"] > table["runs"]]


def stable_share(runs: Sequence[Run], y: NDArray[np.int64], score: Score) -> float:
    """Of the rows that any run suspects, the share that all of them do; NaN with one run."""
    masks = np.stack([suspects(run, y, score) for run in runs])
    union = int(masks.any(axis=0).sum())
    return int(masks.all(axis=0).sum()) / union if len(runs) > 1 and union else float("nan")
