"""``fine-bench sensitivity``: rebuild the bands of a results folder."""

from __future__ import annotations

import argparse

from fine_bench.commands import common


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "sensitivity",
        "How far each method's numbers move over preset ranges of its options. It is rebuilt from "
        "the records of DIR, printed, and written to DIR/sensitivity.md and DIR/sensitivity.csv. "
        "Nothing is trained, and nothing is selected: the leaderboard shows each row with its own "
        "options.",
        notes="The ranges are those of conf/sensitivity, run with\n"
        "  python -m fine_bench +experiment=mnist_mlp 'sensitivity=[fine,trak]' -m seed=0,1,2",
        statuses={**common.REBUILT, 2: "no cells of a range, or an unknown task"},
        examples=["", "--task mnist_mlp --format md"],
    )
    common.add_results(made)
    common.add_printing(
        made, ("table", "md", "csv"), "tables of 100 columns (default), Markdown or csv"
    )
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Rebuild, print and write the bands."""
    from fine_bench.errors import DataError
    from fine_bench.leaderboard import sensitivity_tables
    from fine_bench.leaderboard.sensitivity import spreads
    from fine_bench.store.records import RecordStore
    from fine_bench.terminal import record_bar

    store = RecordStore(arguments.results)
    with record_bar() as bar:
        scan = store.scan()
        found = spreads(store, scan, bar.comparing)
    for line in (f"read: {store.sources}", *scan.problems):
        common.say(line, error=True)
    if not found:
        raise DataError(
            f"no cells of a range below {store.records}. Run some, for instance `fine-bench run "
            "sensitivity=fine`, or name the folder that holds records/ with --results DIR"
        )
    common.check_name("task", arguments.task, {spread.task for spread in found})
    chosen = [s for s in found if arguments.task in (None, s.task)]
    common.print_as(arguments.format, sensitivity_tables, chosen)
    written = common.write_tables(sensitivity_tables, found, arguments.results)
    complete = written and not scan.problems and all(s.complete for s in chosen)
    return common.DONE if complete else common.INCOMPLETE
