"""Who finds the natural label errors of MNIST, and who finds them in every run?

    python -m fine_bench +experiment=mnist_natural -m seed=0,1,2,3,4,5
    python benchmarks/natural_errors.py [--results results] [--probabilities FILE]

Average precision among the 10,000 test images and among the 100 that people reviewed, as the
records have it; recall of the bad among the 15 most suspicious, of one run and of all runs together
(``metrics.stable``), among the reviewed alone, from the scores. ``--probabilities`` names the
study's own cross-validated probabilities
(``cross_validated_predicted_probabilities/mnist_test_set_pyx.npy`` of the public repository
cleanlab/label-errors; looked for as ``label_errors/mnist_test_set_pyx.npy`` below
``FINE_BENCH_DATA``), which stand as an outside row: − log of the probability of the given label, by
networks that were not trained on the image. They chose the 100.

Written are ``natural_errors.md`` and ``.csv``. Scores need not all be at hand: the recalls of the
``.csv`` that is there stay where fewer runs would measure them again, and rows without a record
stay whole. Exit status: 0, or 2 where there is nothing to
read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from outputs import Outputs, add_results, made_earlier, number_text, shown

from fine_bench.data import downloads
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.metrics.intervals import Interval, mean_interval
from fine_bench.metrics.stable import stable_metrics
from fine_bench.metrics.top import found_in_top
from fine_bench.store.records import RecordStore, newest
from fine_bench.store.scores import asked_about, carried_truth

TASK = "mnist_natural"
N_TEST = 10_000
OUTSIDE = "outside"
REVIEWED = "reviewed_average_precision"
NUMBERS = (
    "runs", "average_precision", "average_precision_lower", "average_precision_upper",
    "reviewed_average_precision", "reviewed_lower", "reviewed_upper", "scored_runs", "recall",
    "stable_recall",
)  # fmt: skip
"""Columns of the ``.csv`` after the names, in this order."""

PROBABILITIES = Path("label_errors") / "mnist_test_set_pyx.npy"


@dataclass(frozen=True)
class Line:
    """A method on one model.

    Attributes:
        model, row: names.
        n: number of runs.
        known, reviewed: average precision among the test images and among the reviewed.
        scored: number of runs whose scores the recalls are of.
        recall: of the bad among as many most suspicious reviewed, one run; NaN for no scores.
        stable: the same, flagged in all runs; NaN for fewer than two.
    """

    model: str
    row: str
    n: int
    known: Interval
    reviewed: Interval
    scored: int
    recall: float
    stable: float


@dataclass
class Runs:
    """What is known of the runs of a method, by seed.

    Attributes:
        known, reviewed: average precision.
        suspicion: of the reviewed images, ``(n_reviewed,)``, where scores are at hand.
        bad: which of them are bad.
    """

    known: dict[int, float] = field(default_factory=dict)
    reviewed: dict[int, float] = field(default_factory=dict)
    suspicion: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    bad: NDArray[np.bool_] | None = None

    def line(self, model: str, row: str) -> Line:
        """The row that they make."""
        own, recall, stable = list(self.suspicion.values()), math.nan, math.nan
        if own and self.bad is not None:
            k = int(self.bad.sum())
            recall = float(np.mean([found_in_top(run, self.bad, k) / k for run in own]))
        if len(own) > 1 and self.bad is not None:
            stable = stable_metrics(own, self.bad, k)["stable_recall"]
        known, reviewed = mean_interval(self.known), mean_interval(self.reviewed)
        return Line(model, row, len(self.known), known, reviewed, len(own), recall, stable)


def measure(store: RecordStore, probabilities: Path | None) -> list[Line]:
    """All lines of the runs at hand, in order.

    Raises:
        SystemExit: the probabilities do not fit; says what is expected.
    """
    runs: dict[tuple[str, str, str, str], Runs] = {}
    masks: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None
    for record in newest(store.scan().records):
        if record.task != TASK or record.status != "finished" or record.target != "self":
            continue
        if record.varies or REVIEWED not in record.metrics:
            continue
        model = str(record.config["model"]["name"])
        where = (model, record.estimator, record.setting, record.estimator_hash)
        found = runs.setdefault(where, Runs())
        found.known[record.seed] = record.metrics["average_precision"]
        found.reviewed[record.seed] = record.metrics[REVIEWED]
        if not store.has_scores(record):
            continue
        scores = store.load_scores(record)
        truth = carried_truth(scores)
        asked = asked_about(truth, scores.watched)
        if truth is None or asked is None or truth.reviewed is None:
            continue
        masks = truth.is_bad[asked].numpy(), truth.reviewed[asked].numpy()
        found.bad = masks[0][masks[1]]
        found.suspicion[record.seed] = suspicion(scores.values[:, asked], record.end)[masks[1]]
    lines = [found.line(model, row) for (model, row, *_), found in runs.items()]
    if probabilities is not None and masks is not None:
        bad, reviewed = masks
        labels = given_labels()
        p = np.load(probabilities, allow_pickle=False)
        if p.shape != (len(labels), 10) or len(bad) != len(labels):
            raise SystemExit(
                f"{probabilities} has the shape {p.shape}, expected ({len(bad)}, 10): one row for "
                "each of MNIST's test images, all of which the runs must have trained on "
                "(task.n_train=null)"
            )
        own = p[np.arange(len(labels)), labels]
        outside = -np.log(np.maximum(own, np.finfo(np.float64).tiny))
        precision = [
            detection_metrics(outside[of], bad[of])["average_precision"]
            for of in (slice(None), reviewed)
        ]
        study = Runs({0: precision[0]}, {0: precision[1]}, {0: outside[reviewed]}, bad[reviewed])
        lines.append(study.line(OUTSIDE, "cross-validated probability"))
    return ordered(lines)


def ordered(lines: Sequence[Line]) -> list[Line]:
    """The best among the reviewed first, by model; the outside row last."""
    return sorted(lines, key=lambda x: (x.model == OUTSIDE, x.model, -x.reviewed.mean, x.row))


def earlier(table: Path) -> list[Line]:
    """The rows of a ``.csv`` made earlier.

    Raises:
        SystemExit: the file is no such table; says what to do.
    """
    rows = made_earlier(table, ["model", "row"], NUMBERS).itertuples(index=False)
    return [
        Line(x[0], x[1], int(x[2]), Interval(*x[3:6]), Interval(*x[6:9]), int(x[9]), *x[10:])
        for x in rows
    ]


def joined(measured: Sequence[Line], before: Sequence[Line]) -> list[Line]:
    """All rows: those measured, with the recalls of before where these were of more runs."""
    at = {(x.model, x.row): x for x in before}
    lines = []
    for x in measured:
        old = at.pop((x.model, x.row), x)
        more = old.scored > x.scored
        recalls = {"scored": old.scored, "recall": old.recall, "stable": old.stable}
        lines.append(replace(x, **recalls) if more else x)
    return ordered([*lines, *at.values()])


def given_labels() -> NDArray[np.int64]:
    """The given labels of MNIST's test images."""
    from fine_bench.data.mnist import load_mnist

    return load_mnist(download=False).test_labels.astype(np.int64)


def frame(lines: Sequence[Line]) -> pd.DataFrame:
    """One row a line."""
    return pd.DataFrame(
        {
            "model": x.model,
            "row": x.row,
            "runs": x.n,
            "average_precision": x.known.mean,
            "average_precision_lower": x.known.lower,
            "average_precision_upper": x.known.upper,
            "reviewed_average_precision": x.reviewed.mean,
            "reviewed_lower": x.reviewed.lower,
            "reviewed_upper": x.reviewed.upper,
            "scored_runs": x.scored,
            "recall": x.recall,
            "stable_recall": x.stable,
        }
        for x in lines
    )


def markdown(lines: Sequence[Line]) -> str:
    """The table."""
    text = [
        "# Natural label errors of MNIST",
        "",
        "Rebuilt from records and scores by `python benchmarks/natural_errors.py`. All 70,000 "
        "images are trained on; 15 of 100 reviewed test images are bad. Average precision (AP) "
        "among all 10,000 test images, where an error that the study's own network did not suspect "
        "counts as right, and among the 100 reviewed, the fair comparison: mean over the runs with "
        "a 95 % interval over seeds. *One run*, *all runs*: share of the 15 among the 15 most "
        "suspicious of the reviewed, in one run and in every run, of those runs whose scores were "
        "at hand when they were measured (their number, where it is another).",
        "",
        "| model | method | runs | AP, reviewed | AP, all test images | one run | all runs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for x in lines:
        of = "" if x.scored == x.n or math.isnan(x.stable) else f" ({x.scored})"
        text.append(
            f"| {x.model} | {x.row} | {x.n} | {shown(x.reviewed)} | {shown(x.known)} | "
            f"{number_text(x.recall, 2)} | {number_text(x.stable, 2)}{of} |"
        )
    return "\n".join(text) + "\n"


def at_hand() -> Path | None:
    """The study's probabilities below ``FINE_BENCH_DATA``, if they are there."""
    found = (base / PROBABILITIES for base in downloads.bases())
    return next((path for path in found if path.is_file()), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Read, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_results(parser)
    parser.add_argument("--probabilities", metavar="FILE", type=Path, default=at_hand())
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.results
    if arguments.probabilities is not None and not arguments.probabilities.is_file():
        print(
            f"{arguments.probabilities} is no file; give the study's mnist_test_set_pyx.npy, or "
            "leave --probabilities out",
            file=sys.stderr,
        )
        return 2
    store = RecordStore(arguments.results)
    lines = measure(store, arguments.probabilities)
    if not lines:
        print(
            f"no runs of {TASK} below {store.records}; make them with `python -m "
            f"fine_bench +experiment={TASK} -m seed=0,1,2,3,4,5`, or name the folder with "
            "--results",
            file=sys.stderr,
        )
        return 2
    measured = lines
    lines = joined(measured, earlier(arguments.results / "natural_errors.csv"))
    paths = (out / "natural_errors.md", out / "natural_errors.csv")
    files = Outputs(paths, default=arguments.out is None, force=arguments.force)
    files.write(paths[0], markdown(lines))
    files.write(paths[1], frame(lines))
    if n_kept := sum(x not in measured for x in lines):
        print(
            f"recalls of {n_kept} rows kept from natural_errors.csv: their scores are not at hand"
        )
    print(f"written: {', '.join(map(str, paths))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
