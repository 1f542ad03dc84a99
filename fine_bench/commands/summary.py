"""``fine-bench summary``: one table over all tasks, each method by one measure."""

from __future__ import annotations

import argparse

from fine_bench.commands import common


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "summary",
        "One table over all tasks, rebuilt from the records of DIR: methods by one measure. "
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
    made.add_argument("--tasks", nargs="*", default=[], help="default: all, by name")
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Write ``DIR/summary.md`` and print it."""
    from fine_bench.leaderboard.summary import summarise, to_markdown
    from fine_bench.store.files import write_atomic
    from fine_bench.terminal import record_bar

    with record_bar() as bar:
        board, _ = common.read_leaderboard(arguments.results, None, bar)
    text = "\n".join(
        to_markdown(summarise(board, arguments.measure, target, arguments.tasks))
        for target in arguments.target
    )
    write_atomic(arguments.results / "summary.md", text.encode())
    common.say(text)
    for problem in board.problems:
        common.say(problem, error=True)
    return common.DONE if not board.problems else common.INCOMPLETE
