"""Draw the figures of a results folder; see ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fine_bench.leaderboard.build import build
from fine_bench.report.figures.collection import CONSISTENCY, DETECTION, Choice, count, draw
from fine_bench.report.figures.output import write
from fine_bench.report.figures.style import FORMATS
from fine_bench.report.figures.tables import shelves, suffixes, undrawn_cells
from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore
from fine_bench.terminal import bar_on


def _formats(text: str) -> tuple[str, ...]:
    """``png,svg`` as a tuple; an unknown one is refused by the parser with this message."""
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in FORMATS]
    if unknown or not kinds:
        raise argparse.ArgumentTypeError(
            f"{text!r} names {', '.join(unknown) or 'no format'}; type png, svg or png,svg"
        )
    return kinds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fine_bench.figures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Draw figures from DIR/records and DIR/scores into DIR/figures. Nothing is "
        "trained;\nthe same records give the same bytes. A figure for which something is missing "
        "is left out\nand the reason printed.",
        epilog="Figures, one of each a task (and setting, where a task has several):\n"
        "  detection_and_consistency  methods by how well and how reproducibly they find\n"
        "  recall_curves              bad examples found against share inspected\n"
        "  figure1_losses_vary        test losses and ranks over seeds\n"
        "  figure2_consistency        Jaccard@k between runs, raw and corrected for chance\n"
        "  figure4_crossing           trade-off functions that cross, and their Gaussian limits\n"
        "  figure5_p_and_q            the paper's statistic with and without a subset\n"
        "  agreement                  fine_paper against fine, example by example, one seed\n"
        "  fidelity_and_ceiling       agreement with retraining, beside the noise ceiling\n"
        "  cost_and_quality           extra seconds against fidelity (or detection)\n"
        "  tradeoff_curves            trade-off curves of the subsets of figure5\n"
        "  consistency_by_source      runs that differ in initialisation, in order, in both\n"
        "  sensitivity                numbers over preset ranges of the methods' options\n"
        "and figure3_equal_means, which needs no records.\n\n"
        "Exit status: 0 every figure that the records allow was written; 1 a cell failed or is\n"
        "missing, a file cannot be read or written (each is named); 2 no records, an unknown\n"
        "task or a wrong argument. Example: python -m fine_bench.figures --task mnist_mislabel",
    )
    parser.add_argument(
        "--results", metavar="DIR", type=Path, default=Path("results"), help="default: results"
    )
    parser.add_argument("--task", metavar="NAME", help="draw the figures of one task only")
    parser.add_argument(
        "--format",
        metavar="LIST",
        type=_formats,
        default=FORMATS,
        help="png, svg or png,svg (default: both)",
    )
    parser.add_argument(
        "--detection",
        choices=tuple(DETECTION),
        default="auroc",
        help="detection in detection_and_consistency (default: auroc)",
    )
    parser.add_argument(
        "--consistency",
        choices=tuple(CONSISTENCY),
        default="spearman",
        help="consistency in detection_and_consistency (default: spearman)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, write and report; see ``--help``. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    store = RecordStore(arguments.results)
    errors = Console(stderr=True, highlight=False)
    with bar_on(errors) as progress:
        bar = progress.add_task("reading records", total=None)

        def show(done: int, total: int, name: str) -> None:
            progress.update(bar, completed=done, total=total, description=f"comparing {name}")

        board = build(store, show)
        if not board.tables and not board.problems:
            print(
                f"no records below {store.records}. Make some with `python -m fine_bench`, or "
                "name the folder that holds records/ with --results DIR",
                file=sys.stderr,
            )
            return 2
        tasks = sorted({table.task for table in board.tables})
        if arguments.task is not None and arguments.task not in tasks:
            print(f"no task {arguments.task!r}; there are: {', '.join(tasks)}", file=sys.stderr)
            return 2
        names = suffixes(board.tables)
        shown = board if arguments.task is None else board.of_task(arguments.task)
        found = shelves(store, shown, store.scan())
        problems = list(shown.problems)
        folder = arguments.results / "figures"
        drawing = draw(
            found,
            [names[shelf.table.task, shelf.table.setting, shelf.table.data] for shelf in found],
            Choice(arguments.detection, arguments.consistency),
        )
        progress.reset(bar, total=count(found))
        for drawn in drawing:
            progress.update(bar, advance=1, description=drawn.name)
            if drawn.figure is None:
                print(f"left out: {drawn.name}: {drawn.reason}")
                continue
            try:
                for path in write(drawn, folder, arguments.format):
                    print(f"written: {path}")
            except StoreError as error:
                problems.append(str(error))
    for table in shown.tables:
        for line in undrawn_cells(table):
            print(line)
    for line in dict.fromkeys(note for shelf in found for note in shelf.notes):
        print(line)
    problems += [problem for shelf in found for problem in shelf.problems]
    for problem in dict.fromkeys(problems):
        print(problem, file=sys.stderr)
    return 0 if shown.complete and not problems else 1


if __name__ == "__main__":
    raise SystemExit(main())
