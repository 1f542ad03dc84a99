"""``fine-bench leaderboard``: rebuild the tables from records alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fine_bench.leaderboard import render
from fine_bench.leaderboard.build import build
from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore
from fine_bench.terminal import bar_on


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild, print and write the leaderboard; see ``--help``. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fine-bench leaderboard",
        description="Rebuild the leaderboard from DIR/records alone, print it, and write "
        "DIR/leaderboard.md and DIR/leaderboard.csv. Nothing is trained.",
        epilog="Exit status: 0 all is there; 1 a cell failed or is missing, or a file cannot be "
        "read (each is named); 2 no records, or an unknown task. Example: "
        "fine-bench leaderboard --task mnist --format md",
    )
    parser.add_argument(
        "--results", metavar="DIR", type=Path, default=Path("results"), help="default: results"
    )
    parser.add_argument(
        "--format",
        choices=("table", "md", "csv", "json"),
        default="table",
        help="what is printed: tables of 100 columns (default), Markdown, csv or JSON",
    )
    parser.add_argument("--task", metavar="NAME", help="print the tables of one task only")
    parser.add_argument(
        "--allow-packages",
        metavar="PACKAGE",
        nargs="+",
        default=[],
        help="packages besides fine_bench whose metrics get columns",
    )
    arguments = parser.parse_args(argv)
    errors = Console(stderr=True, highlight=False)

    with bar_on(errors) as progress:
        bar = progress.add_task("reading records", total=None)

        def show(done: int, total: int, name: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"comparing {name}")

        found = build(RecordStore(arguments.results), show, arguments.allow_packages)
    if not found.tables and not found.problems:
        print(
            f"no records below {arguments.results / 'records'}. Make some with `python -m "
            "fine_bench`, or name the folder that holds records/ with --results DIR",
            file=sys.stderr,
        )
        return 2
    tasks = sorted({table.task for table in found.tables})
    if arguments.task is not None and arguments.task not in tasks:
        print(f"no task {arguments.task!r}; there are: {', '.join(tasks)}", file=sys.stderr)
        return 2
    shown = found if arguments.task is None else found.of_task(arguments.task)
    if arguments.format == "table":
        render.show(shown)
    else:
        texts = {"md": render.to_markdown, "csv": render.to_csv, "json": render.to_json}
        sys.stdout.write(texts[arguments.format](shown))
    try:
        written = render.write(found, arguments.results)
    except StoreError as error:
        print(error, file=sys.stderr)
        return 1
    print("written: " + ", ".join(map(str, written)), file=sys.stderr)
    return 0 if shown.complete else 1
