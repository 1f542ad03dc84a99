"""``fine-bench summary``: one table over all tasks, each method by one measure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fine_bench.errors import DataError
from fine_bench.leaderboard.build import build
from fine_bench.leaderboard.summary import summarise, to_markdown
from fine_bench.store.files import StoreError, write_atomic
from fine_bench.store.records import RecordStore
from fine_bench.terminal import bar_on


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``DIR/summary.md``; 0 done, 1 a file cannot be read, 2 nothing to summarise."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_bench.summary",
        description="One table over all tasks, rebuilt from DIR/records: methods by one measure.\n"
        "Written to DIR/summary.md and printed.",
        epilog="Exit status: 0 done; 1 a file cannot be read (each is named);\n2 nothing to "
        "summarise, or a wrong argument.\nExample:\n  python -m fine_bench.summary --measure "
        "average_precision --tasks mnist_mislabel cifar10n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results", metavar="DIR", type=Path, default=Path("results"), help="default: results"
    )
    parser.add_argument(
        "--measure",
        default="average_precision",
        help="a column of the leaderboard (default: average_precision)",
    )
    parser.add_argument(
        "--target", nargs="+", default=["self", "validation"], help="default: self validation"
    )
    parser.add_argument("--tasks", nargs="*", default=[], help="default: all, by name")
    arguments = parser.parse_args(argv)
    with bar_on() as progress:
        bar = progress.add_task("reading records", total=None)

        def reading(done: int, total: int, name: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"comparing {name}")

        board = build(RecordStore(arguments.results), reading)
    parts = []
    try:
        for target in arguments.target:
            parts.append(to_markdown(summarise(board, arguments.measure, target, arguments.tasks)))
        text = "\n".join(parts)
        write_atomic(arguments.results / "summary.md", text.encode())
    except (DataError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    for problem in board.problems:
        print(problem, file=sys.stderr)
    return 0 if not board.problems else 1


if __name__ == "__main__":
    raise SystemExit(main())
