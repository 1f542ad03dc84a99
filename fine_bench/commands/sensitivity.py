"""Rebuild the bands of a results folder; see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fine_bench.leaderboard import sensitivity_tables
from fine_bench.leaderboard.sensitivity import spreads
from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore
from fine_bench.terminal import bar_on


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild, print and write the bands; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_bench.sensitivity",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="How far each method's numbers move over preset ranges of its options. It is\n"
        "rebuilt from DIR/records, printed, and written to DIR/sensitivity.md and "
        "DIR/sensitivity.csv.\nNothing is trained, and nothing is selected: the leaderboard shows "
        "each row with its own options.",
        epilog="The ranges are those of conf/sensitivity, run with\n"
        "  python -m fine_bench +experiment=mnist_mlp 'sensitivity=[fine,trak]' -m seed=0,1,2\n\n"
        "Exit status: 0 all is there; 1 a cell failed or is missing, or a file cannot be read\n"
        "or written (each is named); 2 no cells of a range, or an unknown task. Example:\n"
        "  python -m fine_bench.sensitivity --task mnist_mlp --format md",
    )
    add = parser.add_argument
    add("--results", metavar="DIR", type=Path, default=Path("results"), help="default: results")
    add(
        "--format",
        choices=("table", "md", "csv"),
        default="table",
        help="what is printed: tables of 100 columns (default), Markdown or csv",
    )
    add("--task", metavar="NAME", help="print the tables of one task only")
    arguments = parser.parse_args(argv)
    store = RecordStore(arguments.results)
    with bar_on(Console(stderr=True, highlight=False)) as progress:
        bar = progress.add_task("reading records", total=None)

        def shown(done: int, total: int, name: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"comparing {name}")

        scan = store.scan()
        found = spreads(store, scan, shown)
    for problem in scan.problems:
        print(problem, file=sys.stderr)
    if not found:
        print(
            f"no cells of a range below {store.records}. Run some, for instance `python -m "
            "fine_bench sensitivity=fine`, or name the folder that holds records/ with "
            "--results DIR",
            file=sys.stderr,
        )
        return 2
    tasks = sorted({spread.task for spread in found})
    if arguments.task is not None and arguments.task not in tasks:
        print(f"no task {arguments.task!r}; there are: {', '.join(tasks)}", file=sys.stderr)
        return 2
    chosen = [s for s in found if arguments.task in (None, s.task)]
    if arguments.format == "table":
        sensitivity_tables.show(chosen)
    else:
        sys.stdout.write(
            {"md": sensitivity_tables.to_markdown, "csv": sensitivity_tables.to_csv}[
                arguments.format
            ](chosen)
        )
    try:
        written = sensitivity_tables.write(found, arguments.results)
    except StoreError as error:
        print(error, file=sys.stderr)
        return 1
    print("written: " + ", ".join(map(str, written)), file=sys.stderr)
    return 0 if not scan.problems and all(s.complete for s in chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
