"""``fine-bench audit``: the (ε, δ) curves that a subset's influence implies."""

from __future__ import annotations

import argparse

from fine_bench.commands import common

TARGETS = ("self", "queries", "validation", "validation_per_class")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "audit",
        "Print the (epsilon, delta) curves that a subset's influence implies: how well somebody "
        "could tell whether it was trained on. Each curve says whether it is a lower bound (one "
        "statistic) or an upper bound (all steps composed). Records and scores are read, nothing "
        "is trained.",
        statuses={
            0: "printed",
            1: "printed, but a file of records cannot be read (each is named)",
            2: "no such record, group or example (those that exist are named)",
        },
        examples=[
            "--task mnist_mislabel --group random_clean",
            "--task mnist_mislabel --example 17",
        ],
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
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Print the curves; 0 done, 2 nothing to read."""
    from fine_bench.errors import DataError
    from fine_bench.report.audit import of_example, of_group
    from fine_bench.store.records import RecordStore, newest
    from fine_bench.terminal import Terminal

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
        of_group(chosen, arguments.group)
        if arguments.group
        else of_example(store, chosen, arguments.example)
    )
    out = Terminal(soft_wrap=True)
    subject = f"group {arguments.group}" if arguments.group else f"example {arguments.example}"
    out.print(f"{subject} of {arguments.task}, target {arguments.target}, by {estimator}")
    for item in evidence:
        interval = (
            f" [{item.lower:.3g}, {item.upper:.3g}]"
            if item.lower != item.upper
            else ", no interval: the value itself is taken"
        )
        out.print(f"\nseed {item.seed}: mu = {item.mu:.3g}{interval}")
        for curve in item.curves():
            out.print(str(curve))
    return common.INCOMPLETE if scan.problems else common.DONE
