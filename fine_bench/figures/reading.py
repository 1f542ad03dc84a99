"""From a results folder to figures: what goes into which, and what is missing for it.

Reads records and scores, trains nothing. Which examples are bad is taken from the scores' extra
``truth/is_bad``, ``(n_train,)`` boolean; P and Q samples from the extras ``trace/p``, ``trace/q``
``(n_traced, n_samples)``, ``trace/step`` ``(n_samples,)`` and ``trace/subset`` ``(n_traced,)``
(the example's index, or −1 − g for group g) of the paper's estimator, less ``trace/auxiliary``
``(n_traced, n_samples)`` where it used an auxiliary model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import rankdata

from fine_bench.figures import agreement as agreements
from fine_bench.figures import benchmark, runs, theory
from fine_bench.figures.shelf import TRUTH, Shelf
from fine_bench.leaderboard import Row, stat_key
from fine_bench.metrics.agreement import agreement
from fine_bench.metrics.detection import detection_curve
from fine_bench.metrics.intervals import Interval
from fine_bench.testing import moment_mu
from fine_bench.types import InfluenceScores, RunRecord

Array = NDArray[np.float64]

TRACE = ("trace/p", "trace/q", "trace/step", "trace/subset")
PAPER = "fine_paper"
ALL_EXAMPLES = "fine"
FIGURES = (
    "detection_and_consistency",
    "recall_curves",
    "figure1_losses_vary",
    "figure2_consistency",
    "figure3_equal_means",
    "figure4_crossing",
    "figure5_p_and_q",
    "agreement",
)
DETECTION: Mapping[str, str] = {"auroc": "AUROC", "average_precision": "average precision"}
CONSISTENCY: Mapping[str, str] = {
    "spearman": "Spearman correlation between runs",
    "jaccard_corrected": "Jaccard@k between runs, corrected for chance",
}


class LeftOutError(Exception):
    """A figure cannot be drawn from these records. The message is the reason that is printed."""


@dataclass(frozen=True)
class Choice:
    """What the figure of detection and consistency is drawn in."""

    detection: str = "auroc"
    consistency: str = "spearman"


@dataclass(frozen=True)
class Drawn:
    """A figure by the name of its file, or the reason why there is none."""

    name: str
    figure: Figure | None
    reason: str = ""


# --------------------------------------------------------------------------------- each figure


def _interval(row: Row, source: Literal["metrics", "consistency"], name: str) -> Interval | None:
    stat = row.stats.get(stat_key(source, name))
    return None if stat is None else Interval(stat.mean, stat.lower, stat.upper)


def _need_two_seeds(shelf: Shelf) -> None:
    rows = shelf.rows()
    if not rows:
        raise LeftOutError("no estimator has a finished record")
    if max(len(row.seeds) for row in rows) < 2:
        seeds = sorted({seed for row in rows for seed in row.seeds})
        raise LeftOutError(
            f"needs at least two seeds of one method, there is only seed "
            f"{', '.join(map(str, seeds))}; run with more, for instance seed=0,1,2"
        )


def _detection_and_consistency(shelf: Shelf, choice: Choice) -> Figure:
    _need_two_seeds(shelf)
    panels: dict[str, list[benchmark.Point]] = {}
    for row in shelf.rows():
        y = _interval(row, "metrics", choice.detection)
        x = _interval(row, "consistency", choice.consistency)
        if x is not None and y is not None:
            points = panels.setdefault(row.target, [])
            points.append(benchmark.Point(row.label, x, y, len(row.seeds)))
    if not panels:
        raise LeftOutError(
            f"no method has both {choice.detection} and {choice.consistency}; detection needs a "
            "task with known bad examples, consistency the scores of two seeds"
        )
    return benchmark.detection_and_consistency(
        panels,
        shelf.looks,
        x_label=f"consistency: {CONSISTENCY[choice.consistency]}",
        y_label=f"detection: {DETECTION[choice.detection]}",
        size=f"{shelf.size}; mean and 95 % interval over seeds",
    )


def _recall_curves(shelf: Shelf, choice: Choice) -> Figure:
    del choice
    if not shelf.rows():
        raise LeftOutError("no estimator has a finished record")
    panels: dict[str, list[benchmark.Recall]] = {}
    rate = 0.0
    for row in shelf.rows():
        curves = []
        share: Array | None = None
        for seed in row.seeds:
            values, bad = shelf.vector(row, seed), shelf.truth(row, seed)
            if values is None or bad is None or not 0 < bad.sum() < len(bad):
                continue
            rate = float(bad.mean())
            share, recall = detection_curve(values, bad)
            curves.append(recall)
        if share is not None:
            panels.setdefault(row.target, []).append(
                benchmark.Recall(row.label, share, np.stack(curves))
            )
    if not panels:
        raise LeftOutError(
            f"no scores say which examples are bad (extra {TRUTH!r}), so recall cannot be drawn; "
            "recompute with force=true where the records are older than that"
        )
    return benchmark.recall_curves(
        panels,
        shelf.looks,
        rate=rate,
        size=f"{shelf.size}; mean over seeds, band: lowest to highest seed",
    )


def _losses_vary(shelf: Shelf, choice: Choice) -> Figure:
    del choice
    _need_two_seeds(shelf)
    losses: dict[int, list[float]] = {}
    for _, record in sorted(shelf.records.items()):
        curves = record.training.get("curves")
        values = curves.get("test_loss") if isinstance(curves, Mapping) else None
        if isinstance(values, Sequence) and values:
            losses.setdefault(record.seed, [float(v) for v in values])
    if len(losses) < 2:
        raise LeftOutError(
            f"the records of {len(losses)} seed(s) hold test losses by epoch "
            "(training.curves.test_loss), two are needed"
        )
    target = shelf.targets[0]
    rows = shelf.rows(target)
    seeds = max((row.seeds for row in rows), key=len)
    ranks = []
    for row in rows:
        if row.seeds != seeds:
            continue
        vectors = [v for v in (shelf.vector(row, seed) for seed in seeds) if v is not None]
        # a constant score never moves, and says nothing
        if len(vectors) == len(seeds) and all(np.ptp(v) > 0 for v in vectors):
            percent = [100 * (rankdata(v) - 0.5) / len(v) for v in vectors]
            ranks.append(runs.Ranks(row.label, np.stack(percent)))
    if not ranks or len(seeds) < 2:
        raise LeftOutError(f"no method has readable scores of two seeds for target {target}")
    return runs.losses_vary(losses, ranks, shelf.looks, seeds=seeds, target=target, size=shelf.size)


def _consistency(shelf: Shelf, choice: Choice) -> Figure:
    del choice
    _need_two_seeds(shelf)
    panels: dict[str, list[runs.Bar]] = {}
    for row in shelf.rows():
        raw = _interval(row, "consistency", "jaccard")
        corrected = _interval(row, "consistency", "jaccard_corrected")
        if raw is not None and corrected is not None:
            bars = panels.setdefault(row.target, [])
            # a method that scores a sample has fewer bad examples to find
            own = f"k = {row.k:,}" if row.k != shelf.table.k else ""
            bars.append(runs.Bar(row.label, raw, corrected, len(row.seeds), own))
    if not panels:
        raise LeftOutError("no method has a Jaccard@k; it needs known bad examples, which give k")
    return runs.consistency_bars(
        panels,
        shelf.looks,
        k=shelf.table.k,
        size=f"{shelf.size}; 95 % intervals over seeds",
    )


# -------------------------------------------------------------------------------------- traces


@dataclass(frozen=True)
class Traced:
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


def traced(shelf: Shelf) -> Traced:
    """The traces of the first row and seed of the paper's estimator that has any."""
    rows = [row for row in shelf.rows() if row.estimator.startswith(PAPER)]
    if not rows:
        raise LeftOutError(
            f"no finished record of an estimator {PAPER}, which alone keeps P and Q samples"
        )
    for row in rows:
        for seed in row.seeds:
            scores = shelf.scores(row, seed)
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
            return Traced(
                row,
                seed,
                p[:, keep].astype(np.float64),
                q[:, keep].astype(np.float64),
                step[keep].astype(np.float64),
                subset.astype(np.int64),
                shelf.truth(row, seed),
                signal is not None,
                scores,
                _group_names(shelf.record(row, seed)),
            )
    raise LeftOutError(f"the scores of {PAPER} hold no P and Q samples (extras {', '.join(TRACE)})")


def _group_names(record: RunRecord) -> dict[int, str]:
    """Names of the groups by their number, from the metrics ``group/<name>/index``."""
    found = {}
    for key, value in record.metrics.items():
        head, _, last = key.rpartition("/")
        if head.startswith("group/") and last == "index":
            found[int(value)] = f"group {head.removeprefix('group/')}"
    return found


def _chosen(found: Traced) -> list[tuple[int, str]]:
    """A bad, a typical and a group subset, each with the rule by which it was taken."""
    mu = np.nan_to_num(moment_mu(found.p, found.q).mu)
    single, groups = np.flatnonzero(found.subset >= 0), np.flatnonzero(found.subset < 0)
    chosen: list[tuple[int, str]] = []
    if found.bad is not None and found.bad[found.subset[single]].any():
        among = single[found.bad[found.subset[single]]]
        i = int(among[np.argsort(mu[among], kind="stable")[(len(among) - 1) // 2]])
        chosen.append((i, f"{found.name(i)}: median μ of {len(among)} bad traced"))
    elif len(single):
        i = int(single[np.abs(mu[single]).argmax()])
        chosen.append((i, f"{found.name(i)}: largest |μ| of {len(single)} traced"))
    if len(single):
        all_scores = found.scores.watched_values.mean(dim=0).numpy()
        own = found.scores.values.mean(dim=0).numpy()[found.subset[single]]
        i = int(single[np.abs(own - np.median(all_scores)).argmin()])
        chosen.append((i, f"{found.name(i)}: nearest the median of {len(all_scores):,} scores"))
    if len(groups):
        i = int(groups[np.argmax(found.subset[groups])])
        chosen.append(
            (i, f"{found.name(i)}" + (f", the first of {len(groups)}" if len(groups) > 1 else ""))
        )
    return chosen


def _p_and_q(shelf: Shelf, choice: Choice) -> Figure:
    del choice
    found = traced(shelf)
    traces = [theory.Trace(name, found.step, found.p[i], found.q[i]) for i, name in _chosen(found)]
    where = f"{shelf.table.task}: {found.row.label}, target {found.row.target}, seed {found.seed}"
    return theory.p_and_q(
        traces,
        f"{where}; {len(found.step):,} samples of each",
        "x − auxiliary" if found.auxiliary else "statistic x",
    )


def _crossing(shelf: Shelf, choice: Choice) -> Figure:
    del choice
    found = traced(shelf)
    # 60 subsets have 1,770 pairs: enough to find two that cross
    some = np.unique(np.linspace(0, len(found.subset) - 1, 60).round().astype(int))
    pair = theory.crossing_pair(found.p[some], found.q[some])
    if pair is None:
        raise LeftOutError(
            f"no two of {len(some)} traced subsets have curves that cross by more than the noise "
            f"of {len(found.step):,} samples"
        )
    first, second = (
        theory.measured(found.name(i), found.p[i], found.q[i]) for i in some[list(pair)]
    )
    where = f"{shelf.table.task}: {found.row.label}, target {found.row.target}, seed {found.seed}"
    return theory.crossing(
        (first, second),
        f"{where}; {len(found.step):,} P and Q samples each, in 12 bins, the pair that crosses "
        f"most of {len(some)} subsets",
    )


# ---------------------------------------------------------------------------------- agreement


def _compared(shelf: Shelf, ours: Row, papers: Row, seed: int) -> agreements.Compared | str:
    """The two rows' scores of one run, or why they cannot be compared."""
    x, y = shelf.scores(ours, seed), shelf.scores(papers, seed)
    if x is None or y is None:
        return f"seed {seed}: scores cannot be read"
    if len(x.values) != 1 or x.values.shape != y.values.shape:
        return (
            f"{ALL_EXAMPLES} and {PAPER} have scores of shapes {tuple(x.values.shape)} and "
            f"{tuple(y.values.shape)}, one row of the same examples is needed"
        )
    if x.watched is not None:
        return f"{ours.label} scored a sample only"
    if not y.watched_values.numel():
        return f"{papers.label} scored groups but no single example"
    watched = slice(None) if y.watched is None else y.watched.numpy()
    bad = shelf.truth(ours, seed)
    if bad is None:
        bad = shelf.truth(papers, seed)
    return agreements.Compared(
        x.values[0].double().numpy()[watched],
        y.values[0].double().numpy()[watched],
        None if bad is None else bad[watched],
        agreement(y, x),
    )


def _agreement(shelf: Shelf, choice: Choice) -> Figure:
    """One run: the lowest seed at which most targets have both estimators."""
    del choice
    pairs: dict[str, tuple[Row, Row]] = {}
    absent: dict[str, str] = {}
    for target in shelf.targets:
        rows = shelf.rows(target)
        ours = [row for row in rows if row.estimator == ALL_EXAMPLES]
        papers = [row for row in rows if row.estimator == PAPER]
        if ours and papers:
            pairs[target] = (ours[0], papers[0])
        else:
            names = [name for name, some in ((ALL_EXAMPLES, ours), (PAPER, papers)) if not some]
            absent[target] = f"no finished record of an estimator {' or '.join(names)}"
    found: dict[int, dict[str, agreements.Compared]] = {}
    for target, (one, other) in pairs.items():
        common = sorted(set(one.seeds) & set(other.seeds))
        if not common:
            absent[target] = f"{one.label} and {other.label} have no finished seed in common"
        for seed in common:
            both = _compared(shelf, one, other, seed)
            if isinstance(both, str):
                absent[target] = both
            else:
                found.setdefault(seed, {})[target] = both
    if not found:
        reasons = [f"target {target}: {reason}" for target, reason in absent.items()]
        raise LeftOutError("; ".join(reasons) or "no estimator has a finished record")
    seed = min(found, key=lambda s: (-len(found[s]), s))
    shelf.notes.extend(
        f"{shelf.table.task}: agreement without target {target}: "
        f"{absent.get(target, f'not both at seed {seed}')}"
        for target in shelf.targets
        if target not in found[seed]
    )
    one, other = pairs[next(iter(found[seed]))]
    return agreements.agreement(
        found[seed],
        x_label=one.label,
        y_label=other.label,
        size=f"{shelf.table.task}: {one.label} against {other.label}, seed {seed}",
    )


_OF_TABLES: Mapping[str, Callable[[Shelf, Choice], Figure]] = {
    "detection_and_consistency": _detection_and_consistency,
    "recall_curves": _recall_curves,
    "figure1_losses_vary": _losses_vary,
    "figure2_consistency": _consistency,
    "figure4_crossing": _crossing,
    "figure5_p_and_q": _p_and_q,
    "agreement": _agreement,
}


def draw(found: Sequence[Shelf], names: Sequence[str], choice: Choice) -> Iterator[Drawn]:
    """All figures of all shelves.

    ``figure3_equal_means`` needs no records. ``figure4_crossing`` is made of real samples where
    there are any, and otherwise of two textbook influences, which its title then says.

    Args:
        found: the tables to draw.
        names: a suffix for the files of each.
        choice: measures of ``detection_and_consistency``.
    """
    measured = False
    for figure in FIGURES:
        if figure == "figure3_equal_means":
            yield Drawn(figure, theory.equal_means())
            continue
        for shelf, suffix in zip(found, names, strict=True):
            try:
                yield Drawn(figure + suffix, _OF_TABLES[figure](shelf, choice))
                measured = measured or figure == "figure4_crossing"
            except LeftOutError as reason:
                yield Drawn(figure + suffix, None, str(reason))
        if figure == "figure4_crossing" and not measured:
            pair = theory.analytic_pair()
            source = (
                "textbook pair, exact, no samples of a run: Laplace noise with shift 1/√k; normal "
                "noise with shift 3/√k, 3 times in 10"
            )
            yield Drawn(figure, theory.crossing(pair, source))
