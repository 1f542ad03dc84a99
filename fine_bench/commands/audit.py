"""``fine-bench audit``: what could be told about a subset, and how sure that is."""

from __future__ import annotations

import argparse
import sys

from fine_bench.commands import common

FORMATS = ("table", "md", "json")
TARGETS = ("self", "queries", "validation", "validation_per_class")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "audit",
        "Print how well somebody could tell whether a subset was trained on: errors of the best "
        "test, and (epsilon, delta). What is said to hold at least, or at most, comes from an end "
        "of an interval at the asked confidence; what cannot be bounded is said to be unknown. "
        "Records and scores are read, nothing is trained.",
        statuses={
            0: "printed",
            1: "printed, but a file of records cannot be read (each is named)",
            2: "no such record, group or example (those that exist are named)",
        },
        examples=[
            "--task mnist_mislabel --group random_clean",
            "--task mnist_mislabel --example 17",
            "--task mnist_mislabel --example 17 --confidence 0.99 --format json",
        ],
        notes="The statistic is that of the gradients as they are. Training that clips them and "
        "adds noise (DP-SGD) lets less be told than is printed here; docs/decisions.md has how "
        "much.",
    )
    common.add_results(made)
    made.add_argument("--task", metavar="NAME", required=True, help="of the records")
    made.add_argument(
        "--target", choices=TARGETS, default="self", help="what was asked (default: self)"
    )
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--group", metavar="NAME", help="a group of the paper's estimator")
    which.add_argument("--example", metavar="I", type=int, help="position of a training example")
    made.add_argument(
        "--estimator",
        metavar="ROW",
        help="row of the leaderboard (default: fine_paper for a group, fine for an example)",
    )
    made.add_argument(
        "--confidence",
        metavar="C",
        type=_share,
        default=0.95,
        help="of the intervals, between 0 and 1 (default: 0.95)",
    )
    made.add_argument(
        "--alpha",
        metavar="A",
        type=_share,
        default=0.05,
        help="type-I error at which type-II errors are printed (default: 0.05)",
    )
    made.add_argument(
        "--delta",
        metavar="D",
        type=_share,
        default=1e-5,
        help="delta at which epsilon is printed (default: 1e-5)",
    )
    made.add_argument(
        "--format", choices=FORMATS, default=FORMATS[0], help="what is printed (default: table)"
    )
    return made


def _share(text: str) -> float:
    """A number strictly between 0 and 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number strictly between 0 and 1; type, for instance, 0.95"
        )
    return value


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Print what can be told; 0 done, 2 nothing to read."""
    from fine_bench.errors import DataError
    from fine_bench.report.audit import Audit, of_example, of_group
    from fine_bench.store.records import RecordStore, newest
    from fine_bench.terminal import visible_lines

    estimator = arguments.estimator or ("fine_paper" if arguments.group else "fine")
    store = RecordStore(arguments.results)
    scan = store.scan()
    for problem in scan.problems:
        common.say(problem, error=True)
    chosen = [
        record
        for record in newest(scan.records)
        if (record.task, record.target, record.estimator, record.status)
        == (arguments.task, arguments.target, estimator, "finished")
    ]
    if not chosen:
        raise DataError(
            f"no finished record of {estimator} for task {arguments.task!r} and target "
            f"{arguments.target!r} below {arguments.results}; name the folder with --results"
        )
    evidence = (
        of_group(store, chosen, arguments.group, arguments.confidence)
        if arguments.group
        else of_example(store, chosen, arguments.example, arguments.confidence)
    )
    subject = {
        "kind": "group" if arguments.group else "example",
        "name": arguments.group or str(arguments.example),
        "task": arguments.task,
        "target": arguments.target,
        "estimator": estimator,
    }
    found = Audit(subject, evidence, arguments.confidence, arguments.alpha, arguments.delta)
    shown = {"table": found.to_text, "md": found.to_markdown, "json": found.to_json}
    sys.stdout.write(visible_lines(shown[arguments.format]()))
    return common.INCOMPLETE if scan.problems else common.DONE
