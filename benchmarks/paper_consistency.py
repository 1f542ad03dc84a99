"""The paper's consistency, under every reading that its text leaves open.

    python -m fine_bench +experiment=paper_consistency -m seed=0,1,2,3,4,5
    python -m fine_bench +experiment=paper_consistency -m seed=0,1,2,3,4,5 trainer.init_seed=0
    python -m fine_bench +experiment=paper_consistency -m seed=0,1,2,3,4,5 trainer.order_seed=0
    python -m fine_bench +experiment=paper_consistency -m seed=0,1,2 'targets=[validation]'
    python benchmarks/paper_consistency.py [--results results]

The published number is the mean Jaccard index, over pairs of runs, of the sets of the k % most
suspicious training examples. What runs differ in (the order of the batches, the initialisation,
both) is read off the records, k is 1, 5, 10 and 20 %, and each method stands once as it reads the
last checkpoint and once as it reads the training, where it does both. Of the paper's estimator one
run holds all estimates: by moments, by the published maximum rule, by ranks, and by split samples,
which is the row's own. How many samples of P and of Q it took stands beside it, since its noise
falls with them; with ``estimators.fine_paper.sample=1000 estimators.fine_paper.every_n_steps=2`` it
takes ten times as many, of a fifth of the examples. Summed test influence is the target
*validation*: once as the plain sum over the queries and once, with ``query_weighting=noise``, with
weights.

Written are ``paper_consistency.md`` and ``.csv`` into the results folder, and a figure a reading
into ``figures/``, which git ignores. Runs need not all be at hand: a cell of the ``.csv`` that is
there stays where no scores measure it again. Intervals are bootstrapped over seeds
(``metrics.intervals``). Exit status: 0, or 2 where there are no scores to read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from outputs import Outputs, add_results, made_earlier, number_text, shown

from fine_bench.metrics.consistency import inclusion
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.metrics.intervals import Interval, mean_interval, pair_mean_interval
from fine_bench.report.figures.style import BLUE, GREEN, GREY, ORANGE, canvas, styled, to_bytes
from fine_bench.store.records import RecordStore, newest
from fine_bench.store.scores import carried_truth
from fine_bench.types import InfluenceScores, RunRecord

TASK = "paper_consistency"
SHARES = (0.01, 0.05, 0.1, 0.2)
SOURCES = {"order": ORANGE, "initialisation": BLUE, "both": GREEN}
"""What differs between runs, and its colour."""

LAST, TRAINING = "last checkpoint", "training"

ROWS: Mapping[str, tuple[str, str]] = {
    "fine_paper/moment": ("the paper's estimator, moments", TRAINING),
    "fine_paper/maximum": ("the paper's estimator, its maximum rule", TRAINING),
    "fine_paper/rank": ("the paper's estimator, ranks", TRAINING),
    "fine_paper": ("the paper's estimator, split samples", TRAINING),
    "fine": ("f-INE in-batch, margin", TRAINING),
    "fine_loss": ("f-INE in-batch, loss", TRAINING),
    "trak": ("TRAK", TRAINING),
    "trak_last": ("TRAK", LAST),
    "tracin": ("TracIn", TRAINING),
    "grad_dot": ("TracIn", LAST),
    "kfac": ("K-FAC influence", TRAINING),
    "influence_function": ("influence function (EK-FAC)", LAST),
    "mean_loss": ("loss", TRAINING),
    "final_loss": ("loss", LAST),
    "random": ("random", "–"),
}
"""Row → the method, and what of a run it reads."""

READINGS: Mapping[str, str] = {
    "self": "Scores `self`",
    "validation": "Influence on the test queries, summed",
    "validation/noise": "Influence on the test queries, weighted by noise",
    "validation/norm": "Influence on the test queries, weighted by norm",
}
"""What a score says of an example, and how a table is headed."""

PUBLISHED: Mapping[str, float] = {
    "fine_paper/moment": 0.938,
    "trak_last": 0.736,
    "influence_function": 0.567,
    "grad_dot": 0.564,
}
"""Jaccard at 20 % in the paper, beside the reading that comes nearest to it."""

NUMBERS = ("jaccard", "lower", "upper", "average_precision")
OF_PAPER = ("moment", "maximum", "rank")


@dataclass(frozen=True)
class Line:
    """A row under one source of randomness.

    Attributes:
        row: of ``ROWS``, or an estimator's name.
        note: what tells rows of one name apart; empty for most.
        target, source: what was asked, of ``READINGS``; what differs between the runs.
        n: number of runs.
        jaccard: by share of the examples.
        precision: average precision of detection; NaN where a kept cell does not say.
    """

    row: str
    note: str
    target: str
    source: str
    n: int
    jaccard: Mapping[float, Interval]
    precision: Interval

    @property
    def method(self) -> str:
        """Its name in tables."""
        name = ROWS.get(self.row, (self.row, ""))[0]
        return f"{name}, {self.note}" if self.note else name

    @property
    def reads(self) -> str:
        """What of a run it reads."""
        return ROWS.get(self.row, ("", TRAINING))[1]


def of_source(source: str) -> str:
    """What differs, in words."""
    return "both differ" if source == "both" else f"{source} differs"


def source_of(record: RunRecord) -> str:
    """What differs between the runs of a record's setting; empty where nothing does."""
    trainer: Mapping[str, Any] = record.config["trainer"]
    fixed = trainer.get("init_seed") is not None, trainer.get("order_seed") is not None
    return {
        (False, False): "both",
        (True, False): "order",
        (False, True): "initialisation",
    }.get(fixed, "")


def reading_of(record: RunRecord) -> str:
    """What was asked, of ``READINGS``: of queries also by which weights they are summed."""
    weights = record.config.get("query_weighting")
    return record.target if record.target == "self" or not weights else f"{record.target}/{weights}"


def vectors(record: RunRecord, scores: InfluenceScores) -> dict[str, np.ndarray]:
    """Suspicion ``(n,)`` of the scored examples, of each row that a record's scores hold."""
    found = {record.estimator: suspicion(scores.watched_values, record.end)}
    if scores.watched is not None:
        for name in OF_PAPER:
            if name in scores.extras:
                # nothing can be told of constant samples: no evidence of influence
                extra = scores.extras[name].double().nan_to_num(0.0, posinf=1e3, neginf=-1e3)
                found[f"{record.estimator}/{name}"] = suspicion(extra[None], record.end)
    return found


def note_of(scores: InfluenceScores) -> str:
    """How much the paper's estimator has seen; empty for methods that score all examples."""
    if scores.watched is None or scores.n_observations is None:
        return ""
    n, of = len(scores.watched), len(scores.n_observations)
    samples = f"{int(scores.n_observations.max())} samples"
    return samples if n == of else f"{samples}, {n:,} examples"


def jaccard(runs: Mapping[int, np.ndarray], share: float) -> Interval:
    """Mean Jaccard index over pairs of runs of the top share; ties as in ``metrics.consistency``.

    NaN where a run is the same for all examples.
    """
    k = max(1, round(share * len(next(iter(runs.values())))))
    chances = {seed: inclusion(run, k) for seed, run in runs.items()}
    pairs = {}
    for a, b in combinations(sorted(runs), 2):
        shared = float(chances[a] @ chances[b])
        constant = min(np.ptp(runs[a]), np.ptp(runs[b])) == 0
        pairs[a, b] = math.nan if constant else shared / (2 * k - shared)
    return pair_mean_interval(pairs)


def measure(store: RecordStore, task: str = TASK) -> list[Line]:
    """A line for each row, target and source with at least two runs whose scores are at hand.

    Raises:
        SystemExit: the runs of a row score different examples; says what to type.
    """
    runs: dict[tuple[str, str, str, str], dict[int, np.ndarray]] = {}
    bad: dict[tuple[str, str, str, str], np.ndarray] = {}
    for record in newest(store.scan().records):
        source = source_of(record) if record.task == task and record.status == "finished" else ""
        reading = reading_of(record)
        if not source or reading not in READINGS or record.varies or not store.has_scores(record):
            continue
        scores = store.load_scores(record)
        truth = carried_truth(scores)
        for row, vector in vectors(record, scores).items():
            where = (row, note_of(scores), reading, source)
            if record.seed in runs.setdefault(where, {}):
                raise SystemExit(
                    f"{row} has several settings with runs of seed {record.seed} that differ in "
                    f"{source}; keep the results of one setting in a folder and name it by "
                    "--results"
                )
            runs[where][record.seed] = vector
            if truth is not None:
                asked = slice(None) if scores.watched is None else scores.watched
                bad[where] = truth.is_bad[asked].numpy()
    lines = []
    for (row, note, target, source), found in runs.items():
        if len(found) < 2:
            continue
        if len({len(vector) for vector in found.values()}) > 1:
            raise SystemExit(f"the runs of {row} score different numbers of examples; run it again")
        is_bad = bad.get((row, note, target, source))
        precision = {
            seed: math.nan
            if is_bad is None
            else detection_metrics(vector, is_bad)["average_precision"]
            for seed, vector in found.items()
        }
        of = {share: jaccard(found, share) for share in SHARES}
        lines.append(Line(row, note, target, source, len(found), of, mean_interval(precision)))
    return lines


def ordered(lines: Sequence[Line]) -> list[Line]:
    """By reading, then as ``ROWS`` has them, then by what differs."""
    order = {name: i for i, name in enumerate(ROWS)}
    readings, sources = list(READINGS), list(SOURCES)
    return sorted(
        lines,
        key=lambda x: (
            readings.index(x.target), order.get(x.row, len(order)), x.row, x.note,
            sources.index(x.source),
        ),
    )  # fmt: skip


def kept(table: Path, measured: Sequence[Line]) -> list[Line]:
    """The cells of a ``.csv`` made earlier that ``measured`` does not measure again.

    Raises:
        SystemExit: the file is no such table; says what to do.
    """
    cells = made_earlier(table, ["row", "note", "target", "differs"], ["runs", "share", *NUMBERS])
    found = []
    for key, cell in cells.groupby(["row", "note", "target", "differs"], sort=False):
        numbers = cell[["share", "jaccard", "lower", "upper"]].to_numpy(np.float64)
        jaccard = {share: Interval(mean, low, high) for share, mean, low, high in numbers}
        precision = Interval(float(cell["average_precision"].iloc[0]), math.nan, math.nan)
        found.append(Line(*key, int(cell["runs"].iloc[0]), jaccard, precision))
    strange = sorted(
        {x.target for x in found} - set(READINGS) | {x.source for x in found} - set(SOURCES)
    )
    if strange or any(set(SHARES) - set(x.jaccard) for x in found):
        what = ", ".join(strange) or "other shares than " + ", ".join(map(str, SHARES))
        raise SystemExit(f"{table} holds {what}, which this script does not make; move it away")
    again = {(x.row, x.note, x.target, x.source) for x in measured}
    return [x for x in found if (x.row, x.note, x.target, x.source) not in again]


def frame(lines: Sequence[Line]) -> pd.DataFrame:
    """One line a row, target, source and share."""
    return pd.DataFrame(
        {
            "row": line.row,
            "note": line.note,
            "method": line.method,
            "reads": line.reads,
            "target": line.target,
            "differs": line.source,
            "runs": line.n,
            "share": share,
            "jaccard": value.mean,
            "lower": value.lower,
            "upper": value.upper,
            "average_precision": line.precision.mean,
        }
        for line in lines
        for share, value in line.jaccard.items()
    )


def precision_of(lines: Sequence[Line]) -> str:
    """Average precision of a row, of the first source that has it."""
    known = (x.precision.mean for x in lines if not math.isnan(x.precision.mean))
    return number_text(next(known, math.nan))


def markdown(lines: Sequence[Line]) -> str:
    """The tables."""
    text = [
        "# Consistency as the paper measures it",
        "",
        "Rebuilt from records and scores by `python benchmarks/paper_consistency.py`. Mean Jaccard "
        "index over pairs of runs of the most suspicious examples, with a 95 % interval over the "
        "seeds. *reads*: whether the method looks at the last checkpoint or at the training. AP: "
        "average precision of finding the flips, of the first column that has been run. "
        "Cells whose scores were not at hand are those of `paper_consistency.csv`. Published: "
        "at 20 %, beside the reading that comes nearest to the paper's text.",
    ]
    for target in dict.fromkeys(line.target for line in lines):
        mine = [line for line in lines if line.target == target]
        rows = list(dict.fromkeys((line.row, line.note) for line in mine))
        at = {((line.row, line.note), line.source): line for line in mine}
        sources = [source for source in SOURCES if any(line.source == source for line in mine)]
        counts = {s: sorted({line.n for line in mine if line.source == s}) for s in sources}
        heads = [f"{s} ({'–'.join(map(str, counts[s]))} runs)" for s in sources]
        text += [
            "",
            f"## {READINGS[target]}: Jaccard at 20 %, by what differs between runs",
            "",
            f"| method | reads | published | {' | '.join(heads)} | AP |",
            "| --- | --- | ---: |" + " ---: |" * (len(sources) + 1),
        ]
        for row in rows:
            first = next(line for line in mine if (line.row, line.note) == row)
            known = target == "self" and row == next(other for other in rows if other[0] == row[0])
            number = PUBLISHED.get(row[0]) if known else None
            cells = [
                shown(at[row, s].jaccard[0.2]) if (row, s) in at else "not run" for s in sources
            ]
            precision = precision_of([line for line in mine if (line.row, line.note) == row])
            text.append(
                f"| {first.method} | {first.reads} | {'–' if number is None else number} | "
                f"{' | '.join(cells)} | {precision} |"
            )
        for source in sources:
            heads = [f"{share:.0%}" for share in SHARES]
            text += [
                "",
                f"## {READINGS[target]}, {of_source(source)}: Jaccard at k",
                "",
                f"| method | reads | {' | '.join(heads)} |",
                "| --- | --- |" + " ---: |" * len(SHARES),
            ]
            for line in (line for line in mine if line.source == source):
                cells = [shown(line.jaccard[share]) for share in SHARES]
                text.append(f"| {line.method} | {line.reads} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


@styled
def draw(lines: Sequence[Line], target: str) -> Figure:
    """Jaccard at 20 % a row: a point for each source, the published number as a ring."""
    mine = [line for line in lines if line.target == target]
    rows = list(dict.fromkeys((line.row, line.note) for line in mine))
    figure = canvas(7.6, 1.2 + 0.3 * len(rows))
    axes = figure.subplots()
    for i, (source, colour) in enumerate(SOURCES.items()):
        found = [line for line in mine if line.source == source]
        values = [line.jaccard[0.2] for line in found]
        mean = np.array([value.mean for value in values])
        low = np.nan_to_num([value.mean - value.lower for value in values])
        high = np.nan_to_num([value.upper - value.mean for value in values])
        places = [rows.index((line.row, line.note)) + 0.2 * (i - 1) for line in found]
        axes.errorbar(
            mean, places, xerr=[low, high], fmt="os^"[i], color=colour, markersize=4,
            elinewidth=0.8, label=of_source(source),
        )  # fmt: skip
    first = {row: i for i, (row, _) in reversed(list(enumerate(rows)))}
    known = [(value, first[row]) for row, value in PUBLISHED.items() if row in first]
    if target == "self" and known:
        x, y = zip(*known, strict=True)
        axes.plot(x, y, "o", mfc="none", mec=GREY, ms=11, linestyle="none", label="published")
    names = [next(line for line in mine if (line.row, line.note) == row) for row in rows]
    axes.set_yticks(range(len(rows)), [f"{line.method} ({line.reads})" for line in names])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0.0, 1.0)
    axes.set_xlabel("mean Jaccard index at 20 %")
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Read, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_results(parser)
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.results
    store = RecordStore(arguments.results)
    lines = measure(store)
    if not lines:
        print(
            f"no two runs of {TASK} with scores below {store.records}; make them with `python -m "
            f"fine_bench +experiment={TASK} -m seed=0,1,2,3,4,5`, or name the folder with "
            "--results",
            file=sys.stderr,
        )
        return 2
    earlier = kept(arguments.results / f"{TASK}.csv", lines)
    lines = ordered([*lines, *earlier])
    targets = list(dict.fromkeys(line.target for line in lines))
    figures = {
        target: out / "figures" / f"{TASK}--{target.replace('/', '-')}.png" for target in targets
    }
    paths = (out / f"{TASK}.md", out / f"{TASK}.csv", *figures.values())
    files = Outputs(paths, default=arguments.out is None, force=arguments.force)
    files.write(paths[0], markdown(lines))
    files.write(paths[1], frame(lines))
    for target, path in figures.items():
        files.write(path, to_bytes(draw(lines, target), "png"))
    if earlier:
        print(f"{len(earlier)} cells kept from {TASK}.csv: their scores are not at hand")
    print(f"written: {', '.join(map(str, paths))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
