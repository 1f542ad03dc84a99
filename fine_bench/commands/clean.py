"""``fine-bench clean``: find wrong labels in a table of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fine_bench.commands import common
from fine_bench.errors import ConfigError, UserError

if TYPE_CHECKING:
    import pandas as pd

    from fine_bench.metrics.error_rate import Flags
    from fine_bench.runner.clean.data_files import LabelledData
    from fine_bench.runner.clean.scores import Scored

MODELS = ("mlp", "cnn")
METHODS = ("fine", "mean_loss", "aum")
SHOWN = 10


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "clean",
        "Find wrong labels in your own data, at an error rate.\n\n"
        "Verify a few hundred rows drawn at random (look at each, keep those that are right) and "
        "name them with --trusted. A model is trained on all rows; rows that went through training "
        "unlike the trusted ones are flagged. Of those flagged, at most the share --level is right "
        "after all, on average. Rows are counted from 0. Nothing is deleted or changed.",
        notes="The csv that is written has a row for each flagged row, the most suspicious first: "
        "index, given_label, score, p_value, adjusted_p (the smallest level that flags it) and "
        "suggested_label, the model's most probable other label: a suggestion, which no error rate "
        "covers.\n\n"
        "Choose method and level before looking at the result: the error rate does not cover "
        "trying several and keeping the one that flags the most.",
        statuses={0: "done, whether anything was flagged or not", 2: "bad input"},
        examples=[
            "--data digits.npz --trusted checked.txt",
            "--data table.csv --label species --trusted verified --level 0.05",
        ],
    )
    add = made.add_argument
    add(
        "--data",
        metavar="FILE",
        type=Path,
        required=True,
        help=".npz with x (n, …) numbers and y (n,) whole numbers, or .csv with numeric columns",
    )
    add(
        "--trusted",
        metavar="FILE|COLUMN",
        required=True,
        help="text file of row positions, one a line, or a true/false column of the csv",
    )
    add("--label", metavar="COLUMN", help="label column of the csv")
    add(
        "--model",
        choices=MODELS,
        default="mlp",
        help="mlp: one hidden layer of 256 (default); cnn: two convolutions, for images",
    )
    add(
        "--method",
        choices=METHODS,
        default="fine",
        help="fine: f-INE, how strongly training on the row moved its own prediction (default); "
        "mean_loss: mean loss over the epochs; aum: how far another class led, over the epochs. "
        "On uniformly flipped labels mean_loss and aum find more at the same rate "
        "(results/error_rate.md)",
    )
    add(
        "--level",
        metavar="L",
        type=float,
        default=0.1,
        help="share of wrong flags to accept, on average (default: 0.1)",
    )
    add("--epochs", metavar="N", type=int, default=30, help="default: 30")
    add("--batch-size", metavar="N", type=int, default=64, help="default: 64")
    add("--lr", metavar="ETA", type=float, default=0.05, help="step size of SGD (default: 0.05)")
    add(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="of initialisation and order (default: 0); the same seed gives the same file",
    )
    common.add_output(made, "where to write (default: flagged.csv)", Path("flagged.csv"))
    add("--all", action="store_true", help="write every row, with the columns flagged and trusted")
    return made


def _check(arguments: argparse.Namespace) -> None:
    for name, value, fine, example in (
        ("level", arguments.level, 0 < arguments.level < 1, 0.1),
        ("epochs", arguments.epochs, arguments.epochs >= 1, 30),
        # f-INE compares an example with at least two others of its batch
        ("batch-size", arguments.batch_size, arguments.batch_size >= 3, 64),
        ("lr", arguments.lr, 0 < arguments.lr < float("inf"), 0.05),
        ("seed", arguments.seed, arguments.seed >= 0, 0),
    ):
        if not fine:
            raise ConfigError(f"--{name} {value} is out of range; type for instance {example}")
    for other in (arguments.data, Path(arguments.trusted)):
        if other.exists() and arguments.out.resolve() == other.resolve():
            raise ConfigError(f"--out {arguments.out} would replace an input; name another file")


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Train, flag, write and report."""
    import numpy as np

    from fine_bench.metrics.error_rate import flag
    from fine_bench.runner.clean.data_files import read
    from fine_bench.runner.clean.scores import result, score, warnings_of
    from fine_bench.store.files import check_output, write_output
    from fine_bench.store.spreadsheet import to_csv
    from fine_bench.terminal import bar_on

    _check(arguments)
    check_output(arguments.out, arguments.force)
    try:
        data = read(arguments.data, arguments.trusted, arguments.label)
        # refused before training: the answer does not depend on the scores
        flag(np.zeros(len(data.y)), data.trusted, arguments.level)
        with bar_on() as progress:
            bar = progress.add_task(
                f"training {arguments.model} on {len(data.y)} rows, epochs", total=arguments.epochs
            )
            scored = score(
                data.x, data.y, len(data.classes),
                method=arguments.method, model=arguments.model, epochs=arguments.epochs,
                batch_size=arguments.batch_size, lr=arguments.lr, seed=arguments.seed,
                advance=lambda done: progress.update(bar, completed=done),
            )  # fmt: skip
        flags = flag(scored.suspicion, data.trusted, arguments.level)
    except UserError:
        raise
    except ValueError as error:  # of a model that cannot take these data
        raise ConfigError(str(error)) from error
    table = result(data, scored, flags, arguments.all)
    write_output(arguments.out, to_csv(table).encode(), arguments.force)
    _report(arguments, data, scored, flags, result(data, scored, flags))
    for line in warnings_of(data, scored):
        common.say(f"note: {line}", error=True)
    return common.DONE


def _report(
    arguments: argparse.Namespace,
    data: LabelledData,
    scored: Scored,
    flags: Flags,
    flagged: pd.DataFrame,
) -> None:
    from rich.table import Table

    from fine_bench.runner.clean.scores import explain
    from fine_bench.terminal import Terminal, visible

    out = Terminal()
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in (
        ("data", f"{arguments.data}: {len(data.y)} rows, {len(data.classes)} classes"),
        ("trusted", f"{flags.n_trusted} rows; {flags.n_tested} to be judged"),
        ("model", f"{arguments.model}, {arguments.epochs} epochs, seed {arguments.seed}; predicts "
                  f"{scored.accuracy:.1%} of the given labels"),
        ("method", f"{arguments.method}, level {arguments.level:g}"),
        ("flagged", f"{flags.n_flagged} of {flags.n_tested} "
                    f"({flags.n_flagged / flags.n_tested:.1%})"),
    ):  # fmt: skip
        facts.add_row(name, visible(value))
    out.print(facts)
    if len(flagged):
        rows = Table(title=f"the first {min(SHOWN, len(flagged))} flagged rows")
        for column in flagged.columns:
            rows.add_column(column.replace("_", " "), justify="right")
        for row in flagged.head(SHOWN).itertuples(index=False):
            rows.add_row(*(f"{v:.4g}" if isinstance(v, float) else visible(v) for v in tuple(row)))
        out.print(rows)
    for line in explain(flags):
        out.print(line)
    kind = "every row" if arguments.all else "the flagged rows"
    out.print(
        f"written: {arguments.out}, {kind} (suggested labels are suggestions)", soft_wrap=True
    )  # fmt: skip
