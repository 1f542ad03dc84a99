"""What an auditor asks: how much could be told about a subset? ``python -m fine_bench.audit``.

Reads records and scores, trains nothing, and prints the (ε, δ) curve that a subset's μ implies,
each with the sentence that says whether it is a lower bound (what one statistic shows) or an upper
bound (composition over the steps).

    python -m fine_bench.audit --task mnist_mislabel --group flips_1_to_2
    python -m fine_bench.audit --task mnist_mislabel --example 17 --target self
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore, newest
from fine_bench.theory.privacy import PrivacyCurve, privacy_curve
from fine_bench.types import TARGETS, RunRecord


@dataclass(frozen=True)
class Evidence:
    """What one record says of a subset.

    Attributes:
        seed: run seed.
        mu: signed μ̂ of one statistic.
        lower, upper: its interval, if the record has one; else ``mu`` twice.
        composed: μ composed over the steps, ≥ 0.
    """

    seed: int
    mu: float
    lower: float
    upper: float
    composed: float

    @property
    def sure(self) -> float:
        """The end of the interval nearer 0; 0 if it holds 0."""
        if self.lower <= 0.0 <= self.upper:
            return 0.0
        return min(self.lower, self.upper, key=abs)

    def curves(self) -> list[PrivacyCurve]:
        """The lower bound (at the interval's level) and the upper bound."""
        return [privacy_curve(self.sure, "statistic"), privacy_curve(self.composed, "composition")]


def of_group(records: Iterable[RunRecord], group: str) -> list[Evidence]:
    """Evidence on a group from the records of the paper's estimator.

    Raises:
        ValueError: no record has the group; the message names those that exist.
    """
    found, known = [], set()
    for record in records:
        names = {key.split("/")[1] for key in record.metrics if key.startswith("group/")}
        known |= names
        if group in names:
            m, prefix = record.metrics, f"group/{group}/"
            found.append(
                Evidence(
                    record.seed,
                    m[prefix + "mu"],
                    m[prefix + "lower"],
                    m[prefix + "upper"],
                    abs(m[prefix + "mu_run"]),
                )
            )
    if not found:
        raise ValueError(
            f"no record holds the group {group!r}; "
            + (f"there are: {', '.join(sorted(known))}" if known else "run estimator=fine_paper")
        )
    return sorted(found, key=lambda e: e.seed)


def of_example(store: RecordStore, records: Iterable[RunRecord], example: int) -> list[Evidence]:
    """Evidence on one training example from the all-example f-INE scores.

    Raises:
        ValueError: no scores with a composed bound, or no such example.
    """
    found = []
    for record in records:
        scores = store.load_scores(record)
        if "bound" not in scores.extras or scores.values.shape[0] != 1:
            continue
        n = scores.values.shape[1]
        if not 0 <= example < n:
            raise ValueError(f"example {example} is out of range; the task has 0 … {n - 1}")
        mu = float(scores.values[0, example])
        found.append(Evidence(record.seed, mu, mu, mu, float(scores.extras["bound"][0, example])))
    if not found:
        raise ValueError("no scores of f-INE with one row were found; run estimator=fine")
    return sorted(found, key=lambda e: e.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the curves; 0 done, 2 nothing to read."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_bench.audit",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print the (epsilon, delta) curves that a subset's influence implies: how well "
        "somebody could\ntell whether it was trained on. Each curve says whether it is a lower "
        "bound (one statistic) or an\nupper bound (all steps composed). Records and scores are "
        "read, nothing is trained.",
        epilog="Exit status: 0 printed; 2 no such record, group or example (those that exist are "
        "named).\n\nExamples:\n"
        "  python -m fine_bench.audit --task mnist_mislabel --group random_clean\n"
        "  python -m fine_bench.audit --task mnist_mislabel --example 17",
    )
    parser.add_argument(
        "--results", metavar="DIR", type=Path, default=Path("results"), help="default: results"
    )
    parser.add_argument("--task", metavar="NAME", required=True, help="of the records")
    parser.add_argument(
        "--target", choices=TARGETS, default="self", help="what was asked (default: self)"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--group", metavar="NAME", help="a group of the paper's estimator")
    which.add_argument("--example", metavar="I", type=int, help="position of a training example")
    parser.add_argument(
        "--estimator",
        metavar="ROW",
        help="row of the leaderboard (default: fine_paper for a group, fine for an example)",
    )
    arguments = parser.parse_args(argv)
    estimator = arguments.estimator or ("fine_paper" if arguments.group else "fine")
    store = RecordStore(arguments.results)
    chosen = [
        record
        for record in newest(store.scan().records)
        if (record.task, record.target, record.estimator, record.status)
        == (arguments.task, arguments.target, estimator, "finished")
    ]
    try:
        if not chosen:
            raise ValueError(
                f"no finished record of {estimator} for task {arguments.task!r} and target "
                f"{arguments.target!r} below {arguments.results}; name the folder with --results"
            )
        evidence = (
            of_group(chosen, arguments.group)
            if arguments.group
            else of_example(store, chosen, arguments.example)
        )
    except (ValueError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    out = Console(highlight=False, soft_wrap=True)
    subject = f"group {arguments.group}" if arguments.group else f"example {arguments.example}"
    out.print(f"{subject} of {arguments.task}, target {arguments.target}, by {estimator}")
    for item in evidence:
        interval = (
            f" \\[{item.lower:.3g}, {item.upper:.3g}]"
            if item.lower != item.upper
            else ", no interval: the value itself is taken"
        )
        out.print(f"\nseed {item.seed}: mu = {item.mu:.3g}{interval}")
        for curve in item.curves():
            out.print(str(curve), markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
