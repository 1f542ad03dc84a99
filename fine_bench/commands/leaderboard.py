"""``fine-bench leaderboard``: rebuild the tables from records alone."""

from __future__ import annotations

import argparse
import sys

from fine_bench.commands import common


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "leaderboard",
        "Rebuild the leaderboard from the records alone, those in DIR/published and your own in "
        "DIR/records, print it, and write DIR/leaderboard.md and DIR/leaderboard.csv. Nothing is "
        "trained.",
        statuses={
            0: "all is there",
            1: "a cell failed or is missing, or a file cannot be read or written (each is named)",
            2: "no records, or an unknown task",
        },
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
    from fine_bench.store.files import StoreError
    from fine_bench.terminal import record_bar

    with record_bar() as bar:
        board, shown = common.read_leaderboard(
            arguments.results, arguments.task, bar, arguments.allow_packages
        )
    if arguments.format == "table":
        render.show(shown)
    else:
        texts = {"md": render.to_markdown, "csv": render.to_csv, "json": render.to_json}
        sys.stdout.write(texts[arguments.format](shown))
    try:
        written = render.write(board, arguments.results)
    except StoreError as error:
        common.say(error, error=True)
        return common.INCOMPLETE
    common.say("written: " + ", ".join(map(str, written)), error=True)
    return common.DONE if shown.complete else common.INCOMPLETE
