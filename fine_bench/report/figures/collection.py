"""From a results folder to figures: what goes into which, and what is missing for it.

Reads records and scores, trains nothing. Which examples are bad is taken from the scores' extra
``truth/is_bad``, ``(n_train,)`` boolean; for P and Q samples see ``samples``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import rankdata

from fine_bench.leaderboard.tables import Row
from fine_bench.metrics.agreement import agreement
from fine_bench.metrics.detection import detection_curve
from fine_bench.report.figures import agreement as agreements
from fine_bench.report.figures import (
    benchmark,
    costs,
    fidelity,
    option_ranges,
    randomness,
    recall,
    runs,
    theory,
    tradeoff,
)
from fine_bench.report.figures.requirements import (
    LeftOutError,
    in_full,
    interval_of,
    require_rows,
    require_two_seeds,
)
from fine_bench.report.figures.samples import PAPER, chosen, run_samples
from fine_bench.report.figures.tables import TRUTH, TableResults

Array = NDArray[np.float64]

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
    "fidelity_and_ceiling",
    "cost_and_quality",
    "cost_and_stable_recall",
    "tradeoff_curves",
    "consistency_by_source",
    "sensitivity",
)


@dataclass(frozen=True)
class Measures:
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


def _detection_and_consistency(results: TableResults, measures: Measures) -> Figure:
    require_two_seeds(results)
    panels: dict[str, list[benchmark.MethodPoint]] = {}
    for row in results.rows():
        y = interval_of(row, "metrics", measures.detection)
        x = interval_of(row, "consistency", measures.consistency)
        if x is not None and y is not None:
            points = panels.setdefault(row.target, [])
            points.append(benchmark.MethodPoint(row.label, x, y, len(row.seeds)))
    if not panels:
        raise LeftOutError(
            f"no method has both {measures.detection} and {measures.consistency}; detection needs "
            "a task with known bad examples, consistency the scores of two seeds"
        )
    return benchmark.detection_and_consistency(
        panels,
        results.looks,
        x_label=f"consistency: {in_full('consistency', measures.consistency)}",
        y_label=f"detection: {in_full('metrics', measures.detection)}",
        size=f"{results.size}; mean and 95 % interval over seeds",
        titles=results.titles,
    )


def _recall_curves(results: TableResults, measures: Measures) -> Figure:
    del measures
    require_rows(results)
    panels: dict[str, list[recall.Recall]] = {}
    rate = 0.0
    for row in results.rows():
        curves = []
        share: Array | None = None
        for seed in row.seeds:
            values, bad = results.vector(row, seed), results.truth(row, seed)
            if values is None or bad is None or not 0 < bad.sum() < len(bad):
                continue
            rate = float(bad.mean())
            share, found = detection_curve(values, bad, recall.points_for(rate))
            curves.append(found)
        if share is not None:
            panels.setdefault(row.target, []).append(
                recall.Recall(row.label, share, np.stack(curves))
            )
    if not panels:
        raise LeftOutError(
            f"no scores say which examples are bad (extra {TRUTH!r}), so recall cannot be drawn; "
            "recompute with force=true where the records are older than that"
        )
    return recall.recall_curves(
        panels,
        results.looks,
        rate=rate,
        size=f"{results.size}; mean over seeds, band: lowest to highest seed",
        titles=results.titles,
    )


def _losses_vary(results: TableResults, measures: Measures) -> Figure:
    del measures
    require_two_seeds(results)
    losses: dict[int, list[float]] = {}
    for _, record in sorted(results.records.items()):
        curves = record.training.get("curves")
        values = curves.get("test_loss") if isinstance(curves, Mapping) else None
        if isinstance(values, Sequence) and values:
            losses.setdefault(record.seed, [float(v) for v in values])
    if len(losses) < 2:
        raise LeftOutError(
            f"the records of {len(losses)} seed(s) hold test losses by epoch "
            "(training.curves.test_loss), two are needed"
        )
    target = results.targets[0]
    rows = results.rows(target)
    seeds = max((row.seeds for row in rows), key=len)
    ranks = []
    for row in rows:
        if row.seeds != seeds:
            continue
        vectors = [v for v in (results.vector(row, seed) for seed in seeds) if v is not None]
        # a constant score never moves, and says nothing
        if len(vectors) == len(seeds) and all(np.ptp(v) > 0 for v in vectors):
            percent = [100 * (rankdata(v) - 0.5) / len(v) for v in vectors]
            ranks.append(runs.Ranks(row.label, np.stack(percent)))
    if not ranks or len(seeds) < 2:
        raise LeftOutError(f"no method has readable scores of two seeds for target {target}")
    return runs.losses_vary(
        losses, ranks, results.looks, seeds=seeds, target=target, size=results.size
    )


def _consistency(results: TableResults, measures: Measures) -> Figure:
    del measures
    require_two_seeds(results)
    panels: dict[str, list[runs.Bar]] = {}
    for row in results.rows():
        raw = interval_of(row, "consistency", "jaccard")
        corrected = interval_of(row, "consistency", "jaccard_corrected")
        if raw is not None and corrected is not None:
            bars = panels.setdefault(row.target, [])
            # a method that scores a sample has fewer bad examples to find
            own = f"k = {row.k:,}" if row.k != results.table.k else ""
            bars.append(runs.Bar(row.label, raw, corrected, len(row.seeds), own))
    if not panels:
        raise LeftOutError("no method has a Jaccard@k; it needs known bad examples, which give k")
    return runs.consistency_bars(
        panels,
        results.looks,
        k=results.table.k,
        size=f"{results.size}; 95 % intervals over seeds",
        titles=results.titles,
    )


# ------------------------------------------------------------------------------- P and Q samples


def _p_and_q(results: TableResults, measures: Measures) -> Figure:
    del measures
    found = run_samples(results)
    traces = [theory.Trace(name, found.step, found.p[i], found.q[i]) for i, name in chosen(found)]
    where = f"{results.table.task}: {found.row.label}, target {found.row.target}, seed {found.seed}"
    return theory.p_and_q(
        traces,
        f"{where}; {len(found.step):,} samples of each",
        "x − auxiliary" if found.auxiliary else "statistic x",
    )


def _crossing(results: TableResults, measures: Measures) -> Figure:
    del measures
    found = run_samples(results)
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
    where = f"{results.table.task}: {found.row.label}, target {found.row.target}, seed {found.seed}"
    return theory.crossing(
        (first, second),
        f"{where}; {len(found.step):,} P and Q samples each, in 12 bins, the pair that crosses "
        f"most of {len(some)} subsets",
    )


# ---------------------------------------------------------------------------------- agreement


def _compared(
    results: TableResults, ours: Row, papers: Row, seed: int
) -> agreements.ScorePair | str:
    """The two rows' scores of one run, or why they cannot be compared."""
    x, y = results.scores(ours, seed), results.scores(papers, seed)
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
    bad = results.truth(ours, seed)
    if bad is None:
        bad = results.truth(papers, seed)
    return agreements.ScorePair(
        x.values[0].double().numpy()[watched],
        y.values[0].double().numpy()[watched],
        None if bad is None else bad[watched],
        agreement(y, x),
    )


def _agreement(results: TableResults, measures: Measures) -> Figure:
    """One run: the lowest seed at which most targets have both estimators."""
    del measures
    pairs: dict[str, tuple[Row, Row]] = {}
    absent: dict[str, str] = {}
    for target in results.targets:
        rows = results.rows(target)
        ours = [row for row in rows if row.estimator == ALL_EXAMPLES]
        papers = [row for row in rows if row.estimator == PAPER]
        if ours and papers:
            pairs[target] = (ours[0], papers[0])
        else:
            names = [name for name, some in ((ALL_EXAMPLES, ours), (PAPER, papers)) if not some]
            absent[target] = f"no finished record of an estimator {' or '.join(names)}"
    found: dict[int, dict[str, agreements.ScorePair]] = {}
    for target, (one, other) in pairs.items():
        common = sorted(set(one.seeds) & set(other.seeds))
        if not common:
            absent[target] = f"{one.label} and {other.label} have no finished seed in common"
        for seed in common:
            both = _compared(results, one, other, seed)
            if isinstance(both, str):
                absent[target] = both
            else:
                found.setdefault(seed, {})[target] = both
    if not found:
        reasons = [f"target {target}: {reason}" for target, reason in absent.items()]
        raise LeftOutError("; ".join(reasons) or "no estimator has a finished record")
    seed = min(found, key=lambda s: (-len(found[s]), s))
    results.notes.extend(
        f"{results.table.task}: agreement without target {target}: "
        f"{absent.get(target, f'not both at seed {seed}')}"
        for target in results.targets
        if target not in found[seed]
    )
    one, other = pairs[next(iter(found[seed]))]
    return agreements.agreement(
        found[seed],
        x_label=one.label,
        y_label=other.label,
        size=f"{results.table.task}: {one.label} against {other.label}, seed {seed}",
        titles=results.titles,
    )


_OF_TABLES: Mapping[str, Callable[[TableResults, Measures], Figure]] = {
    "detection_and_consistency": _detection_and_consistency,
    "recall_curves": _recall_curves,
    "figure1_losses_vary": _losses_vary,
    "figure2_consistency": _consistency,
    "figure4_crossing": _crossing,
    "figure5_p_and_q": _p_and_q,
    "agreement": _agreement,
    "fidelity_and_ceiling": lambda results, measures: fidelity.draw(results),
    "cost_and_quality": lambda results, measures: costs.draw(results),
    "cost_and_stable_recall": lambda results, measures: costs.draw_stable(results),
    "tradeoff_curves": lambda results, measures: tradeoff.draw(results),
    "sensitivity": lambda results, measures: option_ranges.draw(results),
}


_DIFFERING: Mapping[str, str] = {
    "both": "initialisation and order together",
    "order": "order alone",
    "initialisation": "initialisation alone",
}


def by_source(
    found: Sequence[TableResults], names: Sequence[str], measures: Measures
) -> Iterator[Drawn]:
    """One figure for each family of tables, under the name of its first table."""
    suffix = dict(zip(map(id, found), names, strict=True))
    for family in randomness.families(found):
        first = next(iter(family.tables.values()))
        name = f"consistency_by_source{suffix[id(first)]}"
        if len(family.tables) < 2:
            yield Drawn(
                name,
                None,
                f"the runs differ in {_DIFFERING[next(iter(family.tables))]}; to tell the "
                "sources apart run the task also with trainer.init_seed=0 (order alone) and with "
                "trainer.order_seed=0 (initialisation alone)",
            )
            continue
        try:
            for results in family.tables.values():
                require_two_seeds(results)
            label = in_full("consistency", measures.consistency)
            yield Drawn(name, randomness.draw(family, measures.consistency, label))
        except LeftOutError as reason:
            yield Drawn(name, None, str(reason))


def count(found: Sequence[TableResults]) -> int:
    """How many figures ``draw`` will at most speak of, for a progress bar."""
    return len(found) * len(_OF_TABLES) + len(randomness.families(found)) + 2


def draw(
    found: Sequence[TableResults],
    names: Sequence[str],
    measures: Measures,
    figures: Sequence[str] = FIGURES,
) -> Iterator[Drawn]:
    """All figures of all tables, or some.

    ``figure3_equal_means`` needs no records. ``figure4_crossing`` is made of real samples where
    there are any, and otherwise of two textbook influences, which its title then says.

    Args:
        found: the tables to draw.
        names: a suffix for the files of each.
        measures: measures of ``detection_and_consistency``.
        figures: which of ``FIGURES``.
    """
    measured = False
    for figure in figures:
        if figure == "figure3_equal_means":
            yield Drawn(figure, theory.equal_means())
            continue
        if figure == "consistency_by_source":
            yield from by_source(found, names, measures)
            continue
        for results, suffix in zip(found, names, strict=True):
            try:
                yield Drawn(figure + suffix, _OF_TABLES[figure](results, measures))
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
