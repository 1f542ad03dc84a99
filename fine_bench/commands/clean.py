"""``fine-bench clean``: find wrong labels in a table of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_bench.commands import common
from fine_bench.errors import ConfigError, UserError

if TYPE_CHECKING:
    import pandas as pd

    from fine_bench.metrics.error_rate import Flags
    from fine_bench.runner.clean.cleaning import Cleaning
    from fine_bench.runner.clean.data_files import LabelledData
    from fine_bench.runner.clean.scores import Scored

MODELS = ("mlp", "cnn")
KINDS = ("images", "table", "text", "arrays")
SCORES = ("doubt", "p_label", "margin", "mu")
METHODS = ("fine", "mean_loss", "aum")
SHOWN = 10
LISTED = 100_000
"""Rows on the review page."""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "clean",
        "Find wrong labels in your own data: images, texts, tables, arrays.\n\n"
        "DATA is a folder of images by class, a .csv, .parquet or .jsonl table (numbers and "
        "categories, or a column of text), .npz or .npy arrays, or a folder saved by the library "
        "datasets. Models are trained in several runs, every row is scored by one that has not "
        "seen it, and a folder is written: a ranking with how often the runs agree, a page to "
        "review it on, duplicates, outliers and confused classes, and rows to verify first. With "
        "these, named by --trusted, a second call says which rows can be flagged so that at most "
        "the share --level of them is right after all, on average; it trains nothing again. Your "
        "data are not changed.",
        notes="Files in the folder: ranking.csv (row, name, label, suggested, score, rank, "
        "runs_found of runs, repeats: the chance that another run suspects it too, repeatable, "
        "p_label, mu with its interval, with --trusted p_value and covered), review.html, "
        "verify_first.csv and .html, issues.csv, left_out.csv (rows that could not be "
        "used, each with its reason), summary.md. Rows count from 0; images by the order of their "
        "paths. Finished parts of runs are kept in runs/: a call that was interrupted goes on "
        "there.\n\n"
        "With --data FILE in the place of DATA: one run on all rows of a .npz with x and y or of "
        "a .csv of numbers, with --trusted, and one file with a row for each flagged row, the most "
        "suspicious first: index, given_label, score, p_value, adjusted_p (the smallest level that "
        "flags it) and suggested_label, which no error rate covers.\n\n"
        "Choose score and level before looking at the result: the error rate does not cover "
        "trying several and keeping the one that flags the most.",
        statuses={0: "done, whether anything was flagged or not", 2: "bad input"},
        examples=[
            "photos/",
            "reviews.csv --label stars",
            "photos/ --trusted clean-photos/trusted.txt --force",
            "photos/ --decisions decisions.csv",
            "table.parquet --label species --check",
            "data.npz --probabilities run0.npy run1.npy",
            "--data digits.npz --trusted checked.txt",
        ],
    )
    add = made.add_argument
    add("folder_data", metavar="DATA", nargs="?", help="file or folder; see above")
    add(
        "--data",
        metavar="FILE",
        type=Path,
        help="one run, one file; see below: .npz with x (n, …) numbers and y (n,) whole numbers, "
        "or .csv with numeric columns",
    )
    reading = made.add_argument_group("how DATA is read")
    reading.add_argument(
        "--kind", choices=KINDS, help="what the rows are (default: recognised, and said)"
    )
    add_reading = reading.add_argument
    add_reading(
        "--label",
        metavar="COLUMN",
        help="label column of a table (default: the one called label, target, class or y); for "
        ".npy the file of the labels",
    )
    add_reading("--text", metavar="COLUMN", help="text column (default: the one of sentences)")
    add_reading("--id", metavar="COLUMN", help="column that names the rows (default: their number)")
    add_reading(
        "--drop", metavar="COLUMN", nargs="+", default=[], help="columns the model must not see"
    )
    add_reading("--split", metavar="NAME", help="of a saved data set (default: train)")
    add_reading(
        "--image-size",
        metavar="N",
        type=int,
        help="side that images are scaled to for the model (default: 32, smaller ones as they are)",
    )
    add_reading(
        "--encoding",
        metavar="NAME",
        help="of a text file that is not UTF-8, for instance cp1252 (Windows), latin-1 or utf-16",
    )
    add_reading(
        "--encoder",
        metavar="FOLDER|NAME",
        help="for texts: a network in the hub's format, or a name of sentence-transformers "
        "(default: TF-IDF)",
    )
    add(
        "--trusted",
        metavar="FILE|COLUMN",
        help="verified rows, drawn at random and right: a text file of row positions (for DATA "
        "also names), one a line, or a true/false column of the table",
    )
    add(
        "--level",
        metavar="L",
        type=float,
        default=0.1,
        help="share of flags to accept, on average, that are wrong or that another run would not "
        "repeat (default: 0.1)",
    )
    training = made.add_argument_group("training")
    training.add_argument(
        "--model",
        metavar="NAME|MODULE:NAME",
        help="linear, mlp (one hidden layer of 256; default with --data, and for tables and "
        "arrays), cnn (two convolutions), gn_cnn (three, with group normalisation; default for "
        "images), or your own: an import path package.module:name to a function of (in_shape, "
        "n_classes) that returns a torch.nn.Module or a LightningModule. Its code is run",
    )
    training.add_argument(
        "--probabilities",
        metavar="FILE",
        nargs="+",
        default=[],
        help="of models trained elsewhere, out of sample, one file a run: .npy (rows, classes) or "
        ".csv with a column a class; nothing is trained then",
    )
    training.add_argument("--runs", metavar="R", type=int, default=3, help="default: 3")
    training.add_argument(
        "--score",
        choices=SCORES,
        default=SCORES[0],
        help="what ranks DATA's rows (default: doubt, which finds the most: results/clean.md)",
    )
    training.add_argument("--no-mu", action="store_true", help="without f-INE: faster")
    training.add_argument(
        "--method",
        choices=METHODS,
        default="fine",
        help="with --data: fine: f-INE, how strongly training on the row moved its own prediction "
        "(default); mean_loss: mean loss over the epochs; aum: how far another class led, over the "
        "epochs. On uniformly flipped labels mean_loss and aum find more at the same rate "
        "(results/error_rate.md)",
    )
    training.add_argument(
        "--epochs", metavar="N", type=int, help="with --data default: 30; otherwise at most 40"
    )
    training.add_argument("--batch-size", metavar="N", type=int, help="default: 64")
    training.add_argument(
        "--lr", metavar="ETA", type=float, help="step size of SGD (default: 0.05)"
    )
    training.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="of initialisation, order and all draws (default: 0); the same seed gives the same "
        "files",
    )
    add(
        "--check",
        action="store_true",
        help="retrain with and without the flagged rows, five seeds: does leaving them out help?",
    )
    add(
        "--decisions",
        metavar="FILE",
        type=Path,
        nargs="+",
        help="decisions that the review pages saved: write a cleaned copy of DATA and a trusted "
        "list; nothing is trained",
    )
    common.add_output(
        made,
        "where to write: for DATA a folder (default: clean-NAME), with --data a file "
        "(default: flagged.csv)",
    )
    add("--no-page", action="store_true", help="without the review pages")
    add(
        "--all",
        action="store_true",
        help="with --data: write every row, with the columns flagged and trusted",
    )
    return made


def _defaults(arguments: argparse.Namespace) -> None:
    """Of the form with ``--data``; what belongs to the other form is refused."""
    for name in ("kind", "text", "id", "drop", "split", "image_size", "encoding", "encoder",
                 "probabilities", "no_mu", "check", "decisions", "no_page"):  # fmt: skip
        if getattr(arguments, name):
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option} does not go with --data; type fine-bench clean {arguments.data} …"
            )
    if arguments.trusted is None:
        raise ConfigError(
            f"--data needs --trusted; without a trusted list type fine-bench clean {arguments.data}"
        )
    for name, value in (
        ("model", "mlp"), ("epochs", 30), ("batch_size", 64), ("lr", 0.05),
        ("out", Path("flagged.csv")),
    ):  # fmt: skip
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.model not in MODELS:
        raise ConfigError(
            f"--model {arguments.model} does not go with --data, which takes {' or '.join(MODELS)}"
        )


_OF_TRAINING = (
    "trusted", "check", "model", "probabilities", "encoder", "no_mu", "no_page", "runs", "score",
    "level", "seed", "epochs", "batch_size", "lr",
)  # fmt: skip


def _with_decisions(arguments: argparse.Namespace) -> None:
    """Refuse what decisions would ignore."""
    usual = parser()
    for name in _OF_TRAINING:
        if getattr(arguments, name) != usual.get_default(name):
            raise ConfigError(
                f"--{name.replace('_', '-')} does not go with --decisions, which trains nothing; "
                "leave it out, and give it to the call after this one"
            )


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
    if arguments.data is None:
        from fine_bench.runner.clean import folder

        if arguments.folder_data is None:
            raise ConfigError("name the data: fine-bench clean DATA; --help says what it can be")
        if arguments.all:
            raise ConfigError("--all goes with --data; ranking.csv holds every row")
        if arguments.decisions is not None:
            _with_decisions(arguments)
        folder.run(arguments, _pages)
        return common.DONE
    if arguments.folder_data is not None:
        raise ConfigError(
            f"both {arguments.folder_data} and --data {arguments.data}; name one of them"
        )
    _defaults(arguments)
    return _one_run(arguments)


def _pages(data: str, folder: Path, found: Cleaning, force: bool) -> list[str]:
    """The page of the ranking, and one of the rows to verify, in random order."""
    from fine_bench.report.review.page import write_review_page
    from fine_bench.runner.clean.folder import PAGE, VERIFY_PAGE
    from fine_bench.store.digest import digest

    items = found.items

    def views(rows: Any) -> list[Any]:
        shown: list[Any] = []
        for row in rows:
            try:
                shown.append(items.origin.view(int(row)))
            except (OSError, ValueError, SyntaxError):  # gone or damaged since it was read
                shown.append(None)
        return shown

    note = (
        "score: how far the models prefer another label; μ: what training on the row does to the "
        "model's own prediction of it."
    )
    title = Path(data).name or data
    # the browser keeps decisions under the data, whatever the ranking lists of them
    everything = found.table.sort_values("row")
    own = digest([[str(v) for v in everything[column]] for column in ("row", "name", "label")])
    write_review_page(
        folder / PAGE, found.table.head(LISTED), views, title=title, digest=own,
        class_names=items.classes, notes=[note], force=force,
    )  # fmt: skip
    if found.verify is None:
        return [PAGE]
    drawn = found.table.set_index("row").loc[found.verify.table["row"]].reset_index()
    drawn["rank"] = range(1, len(drawn) + 1)
    write_review_page(
        folder / VERIFY_PAGE, drawn, views, title=f"{title}, rows to verify", digest=own,
        class_names=items.classes, force=force,
        notes=[
            note,
            "These rows were drawn at random and stand in random order. Decide about each of them, "
            "hard ones too: accepted ones become the trusted list.",
        ],
    )  # fmt: skip
    return [PAGE, VERIFY_PAGE]


def _one_run(arguments: argparse.Namespace) -> int:
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
