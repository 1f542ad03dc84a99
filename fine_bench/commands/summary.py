"""``fine-bench summary``: all tasks, each method by one measure."""

from __future__ import annotations

import argparse

from fine_bench.commands import common
from fine_bench.errors import DataError


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "summary",
        "All tasks, rebuilt from the records of DIR: methods by one measure, in one table a kind "
        "of task, or in one of the tasks that are named. A target that none of them has is said. "
        "Written to DIR/summary.md and printed.",
        statuses={
            0: "done",
            1: "a file cannot be read (each is named)",
            2: "nothing to summarise, or a wrong argument",
        },
        examples=["--measure average_precision --tasks mnist_mislabel cifar10n"],
    )
    common.add_results(made)
    made.add_argument(
        "--measure",
        default="average_precision",
        help="a column of the leaderboard (default: average_precision)",
    )
    made.add_argument(
        "--target", nargs="+", default=["self", "validation"], help="default: self validation"
    )
    made.add_argument("--tasks", nargs="*", default=[], help="default: all, by kind and name")
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Write ``DIR/summary.md`` and print it."""
    from fine_bench.leaderboard.summary import text_of
    from fine_bench.store.files import write_atomic
    from fine_bench.terminal import record_bar

    with record_bar() as bar:
        board, _ = common.read_leaderboard(arguments.results, None, bar)
    parts, reasons = [], []
    for target in arguments.target:
        try:
            parts.append(text_of(board, arguments.measure, target, arguments.tasks))
        except DataError as error:
            reasons.append(str(error))
    if not parts:
        raise DataError("\n".join(dict.fromkeys(reasons)))
    text = "\n".join(parts)
    write_atomic(arguments.results / "summary.md", text.encode())
    common.say(text)
    for reason in reasons:
        common.say(f"left out: {reason}")
    for problem in board.problems:
        common.say(problem, error=True)
    return common.DONE if not board.problems else common.INCOMPLETE
