"""``fine-bench report``: write the page of a results folder."""

from __future__ import annotations

import argparse

from fine_bench.commands import common

EXAMPLES = 24


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "report",
        "Write one self-contained page, DIR/report.html: sortable leaderboards with intervals, a "
        "page a task with its figures, and a gallery of the examples with the largest scores. It "
        "opens from the disk and asks the network for nothing. Nothing is trained: records, "
        "scores, ground truths and data sets are read. fine-bench figures writes the figures as "
        "files.",
        notes="Images and texts of the examples are shown where their data set is on this disk "
        "(digits and the generated texts always are; MNIST and CIFAR-10 where FINE_BENCH_DATA "
        "points). Nothing is downloaded.",
        statuses={
            0: "all is there",
            1: "a cell failed or is missing, or a file cannot be read or written (each is named; "
            "the page is written all the same)",
            2: "no records, an unknown task or a wrong argument",
        },
        examples=["", "--task mnist_mlp --row tracin --examples 60 --out t.html"],
    )
    common.add_results(made)
    add = made.add_argument
    common.add_output(made, "default: DIR/report.html, which is replaced")
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
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Read, draw, write."""
    from fine_bench.errors import ConfigError
    from fine_bench.report.figures.tables import table_results
    from fine_bench.report.html.build import make, steps
    from fine_bench.store.files import (
        StoreError,
        check_output,
        write_atomic,
        write_output,
    )
    from fine_bench.store.records import RecordStore
    from fine_bench.terminal import record_bar

    if arguments.examples < 0:
        raise ConfigError(
            f"--examples {arguments.examples} is negative; type for instance --examples 24"
        )
    if arguments.out is not None:
        check_output(arguments.out, arguments.force)
    store = RecordStore(arguments.results)
    with record_bar() as bar:
        board, shown = common.read_leaderboard(arguments.results, arguments.task, bar)
        for name in arguments.row:
            common.check_name(
                "row", name, {row.estimator for table in board.tables for row in table.rows}
            )
        found = table_results(store, shown, store.scan())
        bar.restart(steps(found))
        report = make(
            store,
            shown,
            found,
            examples=arguments.examples,
            rows=arguments.row,
            images=not arguments.no_images,
            step=bar.step,
        )
    path = arguments.out or arguments.results / "report.html"
    problems = [*shown.problems, *report.problems]
    try:
        if arguments.out is None:
            write_atomic(path, report.html)
        else:
            write_output(path, report.html, arguments.force)
        common.say(f"written: {path} ({len(report.html) / 2**20:.1f} MiB)")
    except StoreError as error:
        problems.append(str(error))
    for problem in dict.fromkeys(problems):
        common.say(problem, error=True)
    return common.DONE if shown.complete and not problems else common.INCOMPLETE
