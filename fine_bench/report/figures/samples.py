"""The P and Q samples that the paper's estimator leaves in its score files.

They are the extras ``trace/p``, ``trace/q`` ``(n_traced, n_samples)``, ``trace/step``
``(n_samples,)`` and ``trace/subset`` ``(n_traced,)`` (the example's index, or −1 − g for group g),
less ``trace/auxiliary`` ``(n_traced, n_samples)`` where an auxiliary model was used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fine_bench.leaderboard.tables import Row
from fine_bench.report.figures.requirements import LeftOutError
from fine_bench.report.figures.tables import TableResults
from fine_bench.theory.estimation import moment_mu
from fine_bench.types import InfluenceScores, RunRecord

Array = NDArray[np.float64]

TRACE = ("trace/p", "trace/q", "trace/step", "trace/subset")
PAPER = "fine_paper"


@dataclass(frozen=True)
class RunSamples:
    """P and Q samples of many subsets along one run, and what is known of the subsets."""

    row: Row
    seed: int
    p: Array
    q: Array
    step: Array
    subset: NDArray[np.int64]
    bad: NDArray[np.bool_] | None
    auxiliary: bool
    scores: InfluenceScores
    groups: Mapping[int, str]

    def name(self, i: int) -> str:
        """What the i-th subset is."""
        s = int(self.subset[i])
        if s < 0:
            return self.groups.get(-1 - s, f"group {-1 - s}")
        if self.bad is None:
            return f"example {s}"
        return f"{'bad' if self.bad[s] else 'clean'} example {s}"


def run_samples(results: TableResults) -> RunSamples:
    """The traces of the first row and seed of the paper's estimator that has any."""
    rows = [row for row in results.rows() if row.estimator.startswith(PAPER)]
    if not rows:
        raise LeftOutError(
            f"no finished record of an estimator {PAPER}, which alone keeps P and Q samples"
        )
    for row in rows:
        for seed in row.seeds:
            scores = results.scores(row, seed)
            if scores is None or not all(name in scores.extras for name in TRACE):
                continue
            p, q, step, subset = (np.asarray(scores.extras[name]) for name in TRACE)
            signal = scores.extras.get("trace/auxiliary")
            if p.ndim != 2 or p.shape != q.shape or p.shape != (len(subset), len(step)):
                shapes = ", ".join(str(a.shape) for a in (p, q, step, subset))
                raise LeftOutError(f"{row.estimator} seed {seed}: traces of shapes {shapes}")
            if signal is not None and signal.shape == p.shape:
                p, q = p - np.asarray(signal), q - np.asarray(signal)
            keep = np.isfinite(p).all(axis=0) & np.isfinite(q).all(axis=0)
            if keep.sum() < 2 or not len(subset):
                continue
            return RunSamples(
                row,
                seed,
                p[:, keep].astype(np.float64),
                q[:, keep].astype(np.float64),
                step[keep].astype(np.float64),
                subset.astype(np.int64),
                results.truth(row, seed),
                signal is not None,
                scores,
                _group_names(results.record(row, seed)),
            )
    raise LeftOutError(f"the scores of {PAPER} hold no P and Q samples (extras {', '.join(TRACE)})")


def _group_names(record: RunRecord) -> dict[int, str]:
    """Names of the groups by their number, from the metrics ``group/<name>/index``."""
    found = {}
    for key, value in record.metrics.items():
        head, _, last = key.rpartition("/")
        if head.startswith("group/") and last == "index" and math.isfinite(value):
            found[int(value)] = f"group {head.removeprefix('group/')}"
    return found


def chosen(found: RunSamples) -> list[tuple[int, str]]:
    """A bad, a typical and a group subset, each with the rule by which it was taken."""
    mu = np.nan_to_num(moment_mu(found.p, found.q).mu)
    single, groups = np.flatnonzero(found.subset >= 0), np.flatnonzero(found.subset < 0)
    picked: list[tuple[int, str]] = []
    if found.bad is not None and found.bad[found.subset[single]].any():
        among = single[found.bad[found.subset[single]]]
        i = int(among[np.argsort(mu[among], kind="stable")[(len(among) - 1) // 2]])
        picked.append((i, f"{found.name(i)}: median μ of {len(among)} bad traced"))
    elif len(single):
        i = int(single[np.abs(mu[single]).argmax()])
        picked.append((i, f"{found.name(i)}: largest |μ| of {len(single)} traced"))
    if len(single):
        all_scores = found.scores.watched_values.mean(dim=0).numpy()
        own = found.scores.values.mean(dim=0).numpy()[found.subset[single]]
        i = int(single[np.abs(own - np.median(all_scores)).argmin()])
        picked.append((i, f"{found.name(i)}: nearest the median of {len(all_scores):,} scores"))
    if len(groups):
        i = int(groups[np.argmax(found.subset[groups])])
        picked.append(
            (i, f"{found.name(i)}" + (f", the first of {len(groups)}" if len(groups) > 1 else ""))
        )
    return picked
