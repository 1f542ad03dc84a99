"""``fine-bench leaderboard``: rebuild the tables from records alone."""

from __future__ import annotations

import argparse

from fine_bench.commands import common


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "leaderboard",
        "Rebuild the leaderboard from the records alone, those in DIR/published and your own in "
        "DIR/records, print it, and write DIR/leaderboard.md and DIR/leaderboard.csv. Nothing is "
        "trained.",
        statuses={**common.REBUILT, 2: "no records, or an unknown task"},
        examples=["", "--task mnist_mlp --format md"],
    )
    common.add_results(made)
    common.add_printing(
        made,
        ("table", "md", "csv", "json"),
        "tables of 100 columns (default), Markdown, csv or JSON",
    )
    common.add_packages(made, "packages besides fine_bench whose metrics get columns")
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Rebuild, print and write the leaderboard."""
    from fine_bench.leaderboard import render
    from fine_bench.terminal import record_bar

    with record_bar() as bar:
        board, shown = common.read_leaderboard(
            arguments.results, arguments.task, bar, arguments.allow_packages
        )
    common.print_as(arguments.format, render, shown)
    written = common.write_tables(render, board, arguments.results)
    return common.DONE if written and shown.complete else common.INCOMPLETE
