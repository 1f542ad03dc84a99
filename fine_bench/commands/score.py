"""``fine-bench score``: score anybody's method against a ground truth. Trains nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from fine_bench.commands import common

HALVES = ("development", "published")


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "score",
        "Score a method against a ground truth of retraining. Each FILE holds the scores of one "
        "seed as safetensors: self (n,), queries (q, n), validation (n,), or some of them, "
        "positive where training on an example lowers the loss.",
        statuses={0: "scored", 2: "refused (the reason is printed)"},
        examples=["mine.safetensors --task mnist_mlp --format md"],
    )
    add = made.add_argument
    add("files", metavar="FILE", type=Path, nargs="+", help="one a seed")
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", metavar="NAME", help="name of a ground truth")
    which.add_argument("--truth", metavar="FILE", type=Path, help="a ground-truth file")
    add("--half", choices=HALVES, default="published", help="of the truth; default: published")
    add("--format", choices=("table", "json", "csv", "md"), default="table", help="default: table")
    add("--name", help="of the row; default: the first file's name")
    add(
        "--results",
        metavar="DIR",
        type=Path,
        default=Path("results"),
        help="its ground_truth/ is looked at first; default: results",
    )
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Print the scores' table; 0 done, 2 something cannot be used (the reason is printed)."""
    from fine_bench.leaderboard import render
    from fine_bench.report.score_files import board, read_scores, refuse_copies, warnings_of
    from fine_bench.retraining.truth_files import folders, load, named

    if arguments.truth is not None:
        truth = load(arguments.truth)
    else:
        truth = named(arguments.task, folders(arguments.results))
    runs = [read_scores(path, truth) for path in arguments.files]
    refuse_copies(arguments.files, runs)
    found = board(runs, truth, arguments.half, arguments.name or arguments.files[0].stem)
    common.print_as(arguments.format, render, found)
    for line in warnings_of(found):
        common.say(line, error=True)
    return common.DONE
