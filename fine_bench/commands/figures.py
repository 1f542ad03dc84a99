"""``fine-bench figures``: draw the figures of a results folder."""

from __future__ import annotations

import argparse

from fine_bench.commands import common

FORMATS = ("png", "svg")
DETECTION = ("auroc", "average_precision")
CONSISTENCY = ("spearman", "jaccard_corrected")


def _formats(text: str) -> tuple[str, ...]:
    """``png,svg`` as a tuple; an unknown one is refused by the parser with this message."""
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in FORMATS]
    if unknown or not kinds:
        raise argparse.ArgumentTypeError(
            f"{text!r} names {', '.join(unknown) or 'no format'}; type png, svg or png,svg"
        )
    return kinds


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "figures",
        "Draw figures from the records and scores of DIR into DIR/figures. Nothing is trained; the "
        "same records give the same bytes. A figure for which something is missing is left out "
        "and the reason printed.",
        notes="Figures, one of each a task (and setting, where a task has several):\n"
        "  detection_and_consistency  methods by how well and how reproducibly they find\n"
        "  recall_curves              bad examples found against share inspected\n"
        "  figure1_losses_vary        test losses and ranks over seeds\n"
        "  figure2_consistency        Jaccard@k between runs, raw and corrected for chance\n"
        "  figure4_crossing           trade-off functions that cross, and their Gaussian limits\n"
        "  figure5_p_and_q            the paper's statistic with and without a subset\n"
        "  agreement                  fine_paper against fine, example by example, one seed\n"
        "  fidelity_and_ceiling       agreement with retraining, beside the noise ceiling\n"
        "  cost_and_quality           extra seconds against fidelity (or detection)\n"
        "  cost_and_stable_recall     extra seconds against what every run finds\n"
        "  tradeoff_curves            trade-off curves of the subsets of figure5\n"
        "  consistency_by_source      runs that differ in initialisation, in order, in both\n"
        "  sensitivity                numbers over preset ranges of the methods' options\n"
        "and figure3_equal_means, which needs no records.",
        statuses={
            0: "every figure that the records allow was written",
            1: "a cell failed or is missing, a file cannot be read or written (each is named)",
            2: "no records, an unknown task or a wrong argument",
        },
        examples=["--task mnist_mislabel"],
    )
    common.add_results(made)
    add = made.add_argument
    add("--task", metavar="NAME", help="draw the figures of one task only")
    add(
        "--format",
        metavar="LIST",
        type=_formats,
        default=FORMATS,
        help="png, svg or png,svg (default: both)",
    )
    add(
        "--detection",
        choices=DETECTION,
        default="auroc",
        help="detection in detection_and_consistency (default: auroc)",
    )
    add(
        "--consistency",
        choices=CONSISTENCY,
        default="spearman",
        help="consistency in detection_and_consistency (default: spearman)",
    )
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Draw, write and report."""
    from fine_bench.report.figures.collection import Measures, count, draw
    from fine_bench.report.figures.output import write
    from fine_bench.report.figures.tables import suffixes, table_results, together, undrawn_cells
    from fine_bench.store.files import StoreError
    from fine_bench.store.records import RecordStore
    from fine_bench.terminal import record_bar

    store = RecordStore(arguments.results)
    with record_bar() as bar:
        board, shown = common.read_leaderboard(arguments.results, arguments.task, bar)
        names = suffixes(board.tables)
        found = table_results(store, shown, store.scan())
        problems = list(shown.problems)
        bar.restart(count(found))
        for drawn in draw(
            found,
            [
                names[results.table.task, results.table.setting, results.table.data]
                for results in found
            ],
            Measures(arguments.detection, arguments.consistency),
        ):
            bar.step(drawn.name)
            if drawn.figure is None:
                common.say(f"left out: {drawn.name}: {drawn.reason}")
                continue
            try:
                for path in write(drawn, arguments.results / "figures", arguments.format):
                    common.say(f"written: {path}")
            except StoreError as error:
                problems.append(str(error))
    for table in shown.tables:
        for line in undrawn_cells(table):
            common.say(line)
    for line in dict.fromkeys(note for results in found for note in results.notes):
        common.say(line)
    problems += [problem for results in found for problem in results.problems]
    for problem in together(problems):
        common.say(problem, error=True)
    return common.DONE if shown.complete and not problems else common.INCOMPLETE
