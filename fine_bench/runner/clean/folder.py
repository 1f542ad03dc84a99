"""The folder of a cleaning: its files, what the terminal is told, and decisions applied to it.

Options are those of ``fine-bench clean``, as it parsed them. Review pages are the caller's, since a
runner renders nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fine_bench.errors import ConfigError, DataError
from fine_bench.terminal import say

if TYPE_CHECKING:
    import pandas as pd

    from fine_bench.runner.clean.cleaning import Cleaning
    from fine_bench.runner.clean.inputs.items import Items, Reading

RANKING, ISSUES, LEFT_OUT, SUMMARY = "ranking.csv", "issues.csv", "left_out.csv", "summary.md"
VERIFY, PAGE, VERIFY_PAGE = "verify_first.csv", "review.html", "verify_first.html"
RUNS = "runs"
FIRST = "first_ranking.csv"
"""In ``RUNS``: the ranking of the first run, while the others are on their way."""
TRUSTED, TRUSTED_CLEANED = "trusted.txt", "trusted_cleaned.txt"
SHOWN = 10


def default_folder(data: str) -> Path:
    """``clean-NAME`` beside where the command is called; of a file with its form, as ``a-csv``.

    So data of one name and two forms do not share a folder.
    """
    path = Path(data).expanduser().resolve()
    return Path(f"clean-{path.name if path.is_dir() else path.name.replace('.', '-')}")


Pages: TypeAlias = Callable[[str, Path, "Cleaning", bool], list[str]]
"""``pages(data, folder, found, force)`` writes the review pages and returns their names."""


def run(arguments: argparse.Namespace, pages: Pages) -> None:
    """Clean, write and report; or apply decisions.

    Raises:
        UserError: whatever does not fit, before anything is trained where that can be known.
    """
    data = str(arguments.folder_data)
    folder: Path = arguments.out or default_folder(data)
    _refuse_inside(Path(data), folder)
    if arguments.decisions is not None:
        _decide(arguments, data, folder)
        return
    names = [RANKING, ISSUES, LEFT_OUT, SUMMARY, *([] if arguments.no_page else [PAGE])]
    if arguments.trusted is None:
        names += [VERIFY, *([] if arguments.no_page else [VERIFY_PAGE])]
    _check_folder(folder, names, arguments.force)
    try:
        found = _clean(arguments, data, folder)
    except KeyboardInterrupt:
        kept = len(list((folder / RUNS).glob("*.npz")))
        if kept:
            say(f"{kept} finished part(s) of runs are in {folder / RUNS}; the same call goes on "
                "from there", error=True)  # fmt: skip
        raise
    _write(arguments, data, folder, found, pages)


def _refuse_inside(data: Path, folder: Path) -> None:
    from fine_bench.runner.clean.decisions import COPIES

    inside = data.expanduser().resolve()
    if inside.is_dir() and folder.resolve().is_relative_to(inside):
        raise ConfigError(f"--out {folder} lies in the data; name a folder outside of {data}")
    made = (*COPIES, RANKING, ISSUES, LEFT_OUT, VERIFY)
    if inside in [(folder / name).resolve() for name in made]:
        raise ConfigError(
            f"--out {folder} holds the data, {inside.name}, which would be replaced; name another "
            "folder"
        )


def _check_folder(folder: Path, names: list[str], force: bool) -> None:
    from fine_bench.store.files import check_output

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder")
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise ConfigError(
            f"{folder / there[0]} is already there and would be replaced; name another folder with "
            "--out, or add --force (finished runs in it are used again)"
        )
    for name in names:
        check_output(folder / name, force)


def _options(arguments: argparse.Namespace) -> Reading:
    return {
        "kind": arguments.kind,
        "label": arguments.label,
        "text": arguments.text,
        "name": arguments.id,
        "drop": arguments.drop,
        "split": arguments.split,
        "image_size": arguments.image_size,
        "encoding": arguments.encoding,
    }


def _clean(arguments: argparse.Namespace, data: str, folder: Path) -> Cleaning:
    from fine_bench.runner.clean.cleaning import clean
    from fine_bench.store.files import write_output
    from fine_bench.store.spreadsheet import to_csv
    from fine_bench.terminal import bar_on, visible

    with bar_on() as progress:
        bar = progress.add_task("reading", total=None)

        def advance(what: str, done: int, total: int) -> None:
            progress.update(bar, description=f"{what}, epochs", completed=done, total=total)

        def read(items: Items) -> None:
            say(f"read: {data}: {items.kind}, {items.what}", error=True)

        def first(table: pd.DataFrame) -> None:
            path = folder / RUNS / FIRST
            write_output(path, to_csv(table, float_format="%.6g").encode(), force=True)
            top = ", ".join(visible(name) for name in table["name"].head(5))
            say(f"after the first run, most suspicious: {top}; all in {path}", error=True)

        return clean(
            data,
            **_options(arguments),
            encoder=arguments.encoder,
            trusted=arguments.trusted,
            level=arguments.level,
            model=arguments.model,
            probabilities=arguments.probabilities,
            runs=arguments.runs,
            score=arguments.score,
            influence=not arguments.no_mu,
            check=arguments.check,
            seed=arguments.seed,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            folder=folder / RUNS,
            read=read,
            advance=advance,
            first=first,
        )


# ------------------------------------------------------------------------------------- files


def _write(
    arguments: argparse.Namespace, data: str, folder: Path, found: Cleaning, pages: Pages
) -> None:
    import pandas as pd
    from rich.table import Table

    from fine_bench.store.files import make_folder, write_output
    from fine_bench.store.spreadsheet import to_csv
    from fine_bench.terminal import Terminal, visible

    make_folder(folder)
    left = pd.DataFrame(
        [(one.row, one.name, one.reason) for one in found.items.left_out],
        columns=["row", "name", "reason"],
    )
    tables = {RANKING: found.table, ISSUES: found.issues, LEFT_OUT: left}
    if found.verify is not None:
        tables[VERIFY] = found.verify.table
    for name, table in tables.items():
        text = to_csv(table, float_format="%.6g")
        write_output(folder / name, text.encode(), arguments.force)
    facts, lines = _facts(arguments, data, found), _lines(arguments, data, folder, found)
    summary = ["# What `fine-bench clean` found", ""]
    summary += [f"- {name}: {visible(value)}" for name, value in facts]
    summary += ["", *(f"{visible(line)}\n" for line in lines)]
    write_output(folder / SUMMARY, "\n".join(summary).encode(), arguments.force)
    written = [] if arguments.no_page else pages(data, folder, found, arguments.force)

    out = Terminal()
    grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts:
        grid.add_row(name, visible(value))
    out.print(grid)
    shown = found.table[[*_SHOWN, *(c for c in ("p_value",) if c in found.table.columns)]]
    if (shown["name"] == shown["row"].astype(str)).all():
        shown = shown.drop(columns="name")
    rows = Table(title=f"the first {min(SHOWN, len(shown))} rows")
    for column in shown.columns:
        # a name that does not fit goes on in the next line: cut short it names nothing
        rows.add_column(column.replace("_", " "), justify="right", overflow="fold")
    for row in shown.head(SHOWN).itertuples(index=False):
        rows.add_row(*map(_shown, shown.columns, tuple(row)))
    out.print(rows)
    for line in lines:
        out.print(line)
    files = ", ".join([*tables, SUMMARY, *written])
    out.print(f"written to {folder}: {files}", soft_wrap=True)


def _shown(column: str, value: Any) -> str:
    """A cell of the first rows: chances in percent, other numbers with three digits."""
    from fine_bench.terminal import visible

    if not isinstance(value, float):
        return visible(value)
    if value != value:
        return "–"
    if column != "repeats":
        return f"{value:.3g}"
    return "< 1%" if value < 0.005 else "> 99%" if value > 0.995 else f"{value:.0%}"


_SHOWN = ("row", "name", "label", "suggested", "score", "runs_found", "repeats", "p_label", "mu")


def _facts(arguments: argparse.Namespace, data: str, found: Cleaning) -> list[tuple[str, str]]:
    from fine_bench.runner.clean.scoring import MEANING

    items = found.items
    facts = [("data", f"{data}: {items.kind}, {items.what}")]
    facts.append(("used", f"{len(items)} of {items.n_source} rows, {len(items.classes)} classes"))
    if found.recipe is None:
        facts.append(("model", f"none: probabilities of {len(found.runs)} run(s) were given"))
    else:
        epochs = ", ".join("+".join(map(str, run.epochs)) for run in found.runs)
        worth = sum(run.examples for run in found.runs) / len(items)
        facts.append(
            (
                "model",
                f"{found.recipe.name}, {len(found.runs)} run(s) of {found.recipe.folds} folds; "
                f"epochs {epochs}: as much work as {worth:.0f} epochs on all rows",
            )
        )
    facts.append(("score", f"{arguments.score}: {MEANING[arguments.score]}"))
    n = len(found.suspects)
    stable = "" if found.stable != found.stable else (
        f"; of the rows that any run suspects, {found.stable:.0%} are suspects in all"
    )  # fmt: skip
    facts.append(("suspects", f"{n} rows ({n / len(items):.1%}) in most runs{stable}"))
    kept = found.n_repeatable
    if kept is None:
        facts.append(("repeats", "unknown: it takes two runs or more to say what another would do"))
    else:
        facts.append(
            ("repeats", f"{kept} of them: of these at most {arguments.level:.0%} would be no "
                        "suspects in another run, on average")
        )  # fmt: skip
    if found.flags is not None:
        facts.append(
            ("covered", f"{found.flags.n_flagged} rows at level {arguments.level:g}, with "
                        f"{found.flags.n_trusted} trusted")
        )  # fmt: skip
    return facts


def _lines(arguments: argparse.Namespace, data: str, folder: Path, found: Cleaning) -> list[str]:
    """What the user should know, in sentences."""
    from fine_bench.runner.clean.inputs.items import some
    from fine_bench.runner.clean.issues import summary
    from fine_bench.runner.clean.scores import explain

    items = found.items
    said = [f"note: {note}." for note in items.notes]
    reasons: dict[str, list[str]] = {}
    for one in items.left_out:
        reasons.setdefault(one.reason, []).append(f"{one.name} (row {one.row})")
    for reason, names in list(reasons.items())[:5]:
        said.append(f"left out: {len(names)} row(s), {reason}: {some(names)}.")
    if len(reasons) > 5:
        said.append(f"left out for other reasons: see {LEFT_OUT}.")
    said += [f"{line}." for line in summary(found.issues)]
    if found.cleanlab is not None:
        said.append(f"{found.cleanlab}.")
    trouble = next((run.trouble for run in found.runs if run.trouble), "")
    if trouble:
        said.append(f"no μ: {trouble}")
    if found.flags is not None:
        said += explain(found.flags)
    if found.verify is not None:
        draw = found.verify
        call = f"fine-bench clean {data} --out {folder} --decisions decisions.csv"
        if draw.enough:
            said.append(
                f"For an error rate of {arguments.level:g}: verify the {len(draw.table)} rows of "
                f"{VERIFY}, drawn at random. With {draw.needed} right ones among them, as few as "
                f"{draw.expected} rows can be flagged at that rate. Decide about them on "
                f"{VERIFY_PAGE}, then: {call}"
            )
        else:
            said.append(
                f"For an error rate of {arguments.level:g}, {draw.needed} right rows would be "
                f"needed to flag {draw.expected}; the data have too few for that, so {VERIFY} "
                f"holds half of them. A larger --level needs fewer."
            )
    if found.check is not None:
        what = "covered" if found.flags is not None else "suspected"
        said.append(f"check, leaving out {found.check.removed:.0f} {what} rows on average:")
        said += [f"  {line}." for line in found.check.lines()]
    return said


# --------------------------------------------------------------------------------- decisions


def _check_draw(drawn: pd.DataFrame, items: Items, path: Path) -> None:
    """Refuse the draw of other data: its rows would be trusted here."""
    from fine_bench.store.spreadsheet import cell

    known = dict(zip(items.rows.tolist(), zip(items.names, items.labels, strict=True), strict=True))
    for row, name, label in zip(drawn["row"], drawn["name"], drawn["label"], strict=True):
        here = known.get(int(row))
        # cells that a spreadsheet would take for formulas are marked
        if here is None or any(
            given not in (str(one), cell(str(one)))
            for given, one in zip((name, label), here, strict=True)
        ):
            raise DataError(
                f"{path} was drawn from other data: it names row {row} ({name}, {label}), "
                + ("which is no usable row here" if here is None else f"here {here[0]}, {here[1]}")
                + "; name the folder of these data with --out"
            )


def _decide(arguments: argparse.Namespace, data: str, folder: Path) -> None:
    import pandas as pd

    from fine_bench.runner.clean.decisions import COPIES, apply, counts, decisions_of
    from fine_bench.runner.clean.inputs.recognise import load
    from fine_bench.store.files import make_folder, write_output

    items = load(data, **_options(arguments))
    decisions = decisions_of(arguments.decisions, items)
    drawn = None
    if (folder / VERIFY).is_file():
        try:
            drawn = pd.read_csv(folder / VERIFY, dtype=str, keep_default_na=False)
            drawn = drawn[["row", "name", "label"]].astype({"row": int})
        except Exception as error:
            raise DataError(
                f"{folder / VERIFY} cannot be read ({type(error).__name__}: {error}); run "
                f"`fine-bench clean {data} --out {folder} --force` again"
            ) from error
        _check_draw(drawn, items, folder / VERIFY)
    make_folder(folder)
    names = (*COPIES, *((TRUSTED, TRUSTED_CLEANED) if drawn is not None else ()))
    there = [folder / name for name in names if (folder / name).exists()]
    if there and not arguments.force:
        raise ConfigError(f"{there[0]} is already there and would be replaced; name another "
                          "folder with --out, or add --force")  # fmt: skip
    done = apply(items, decisions, drawn, folder)
    n = counts(decisions)
    say(
        f"{len(decisions)} decisions: {n['accepted']} accepted, {n['rejected']} rejected, "
        f"{n['relabelled']} relabelled"
    )
    say(f"written: {done.copy}, {done.kept} of {items.n_source} rows")
    if drawn is not None:
        for name, rows in ((TRUSTED, done.trusted), (TRUSTED_CLEANED, done.trusted_cleaned)):
            text = "".join(f"{row}\n" for row in rows)
            write_output(folder / name, text.encode(), force=True)
        say(
            f"written: {folder / TRUSTED}, {len(done.trusted)} verified rows of {data}, for "
            f"--trusted; {folder / TRUSTED_CLEANED}, the same rows in the copy"
        )
    for note in done.notes:
        say(f"note: {note}", error=True)
