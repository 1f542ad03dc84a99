"""Write the report of a results folder; see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fine_bench.leaderboard.build import build
from fine_bench.leaderboard.tables import Table
from fine_bench.report.html.build import make, shelves_of, steps
from fine_bench.store.files import StoreError, write_atomic
from fine_bench.store.records import RecordStore
from fine_bench.terminal import bar_on

EXAMPLES = 24


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fine_bench.report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write one self-contained page, DIR/report.html: sortable leaderboards with "
        "intervals, a page\na task with its figures, and a gallery of the examples with the "
        "largest scores. It opens from\nthe disk and asks the network for nothing. Figures are "
        "written to DIR/figures as PNG and SVG too.\nNothing is trained: records, scores, ground "
        "truths and data sets are read.",
        epilog="Images and texts of the examples are shown where their data set is on this disk "
        "(digits and the\ngenerated texts always are; MNIST and CIFAR-10 where FINE_BENCH_DATA "
        "points). Nothing is downloaded.\n\n"
        "Exit status: 0 all is there; 1 a cell failed or is missing, or a file cannot be read or "
        "written\n(each is named; the page is written all the same); 2 no records, an unknown "
        "task or a\nwrong argument.\n\nExamples:\n"
        "  python -m fine_bench.report\n"
        "  python -m fine_bench.report --task mnist_mlp --row tracin --examples 60 --out t.html",
    )
    add = parser.add_argument
    add("--results", metavar="DIR", type=Path, default=Path("results"), help="default: results")
    add("--out", metavar="FILE", type=Path, help="default: DIR/report.html")
    add("--task", metavar="NAME", help="a report of one task only")
    add(
        "--examples",
        metavar="N",
        type=int,
        default=EXAMPLES,
        help=f"of a gallery (default: {EXAMPLES}; 0 for none)",
    )
    add(
        "--row",
        metavar="ESTIMATOR",
        nargs="+",
        default=[],
        help="whose scores the galleries show (default: fine and fine_paper, else the best)",
    )
    add(
        "--no-images",
        action="store_true",
        help="do not read data sets for the examples",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Read, draw, write; see ``--help``. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.examples < 0:
        print(f"--examples {arguments.examples} is negative; type for instance --examples 24",
              file=sys.stderr)  # fmt: skip
        return 2
    store = RecordStore(arguments.results)
    with bar_on() as progress:
        bar = progress.add_task("reading records", total=None)

        def reading(done: int, total: int, name: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"comparing {name}")

        board = build(store, reading)
        if not board.tables and not board.problems:
            print(
                f"no records below {store.records}. Make some with `python -m fine_bench`, or "
                "name the folder that holds records/ with --results DIR",
                file=sys.stderr,
            )
            return 2
        wrong = _unknown(arguments, board.tables)
        if wrong:
            print(wrong, file=sys.stderr)
            return 2
        shown = board if arguments.task is None else board.of_task(arguments.task)
        found = shelves_of(store, shown)
        progress.reset(bar, total=steps(found))
        report = make(
            store,
            shown,
            found,
            examples=arguments.examples,
            rows=arguments.row,
            images=not arguments.no_images,
            step=lambda name: progress.update(bar, advance=1, description=name),
        )
    path = arguments.out or arguments.results / "report.html"
    problems = [*shown.problems, *report.problems]
    try:
        write_atomic(path, report.html)
        print(f"written: {path} ({len(report.html) / 2**20:.1f} MiB)")
        print(f"written: {store.root / 'figures'} (PNG and SVG)")
    except StoreError as error:
        problems.append(str(error))
    for problem in dict.fromkeys(problems):
        print(problem, file=sys.stderr)
    return 0 if shown.complete and not problems else 1


def _unknown(arguments: argparse.Namespace, tables: Sequence[Table]) -> str:
    """What is wrong with the names that were given; empty when nothing is."""
    tasks = sorted({table.task for table in tables})
    if arguments.task is not None and arguments.task not in tasks:
        return f"no task {arguments.task!r}; there are: {', '.join(tasks)}"
    rows = sorted({row.estimator for table in tables for row in table.rows})
    unknown = [name for name in arguments.row if name not in rows]
    if unknown:
        return f"no row {', '.join(map(repr, unknown))}; there are: {', '.join(rows)}"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
