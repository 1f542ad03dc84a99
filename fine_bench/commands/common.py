"""What the commands share: one style of help, exit statuses, progress, and the end of a refusal.

A command's file makes its parser with ``parser`` and decorates its function with ``command``. It is
imported before its arguments are known, so what takes long to import stands in its function: a
``--help`` imports neither PyTorch nor Matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fine_bench.errors import UserError

if TYPE_CHECKING:
    from fine_bench.leaderboard.tables import Leaderboard
    from fine_bench.terminal import RecordBar

DONE = 0
INCOMPLETE = 1
"""Something failed, is missing, or cannot be read or written; each thing is named."""
REFUSED = 2
"""What was asked cannot be done; nothing was made."""
INTERRUPTED = 130

REBUILT = {
    DONE: "all is there",
    INCOMPLETE: "a cell failed or is missing, or a file cannot be read or written (each is named)",
}
"""What the statuses of a command mean that rebuilds tables."""
_LOOKS = {"md": "to_markdown", "csv": "to_csv", "json": "to_json"}

Main: TypeAlias = Callable[[Sequence[str] | None], int]


class _Style(argparse.RawDescriptionHelpFormatter):
    """Paragraphs are filled to the width of the terminal; indented lines stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip().split("\n\n"):
            lines = paragraph.splitlines()
            if any(line.startswith(" ") for line in lines):
                paragraphs.append(paragraph)
            else:
                paragraphs.append(textwrap.fill(" ".join(lines), width, break_on_hyphens=False))
        return "\n\n".join(paragraphs)


def parser(
    name: str,
    description: str,
    *,
    statuses: Mapping[int, str],
    examples: Sequence[str],
    notes: str = "",
) -> argparse.ArgumentParser:
    """The parser of ``fine-bench NAME``, without its arguments.

    Args:
        name: of the command.
        description: what it does, in paragraphs separated by blank lines.
        statuses: what each exit status means.
        examples: arguments after ``fine-bench NAME``, one example a line.
        notes: further paragraphs below the arguments; a block with indented lines stays as it is.
    """
    meanings = "\n".join(
        textwrap.fill(f"{status}  {meaning}", 96, initial_indent="  ", subsequent_indent="     ")
        for status, meaning in statuses.items()
    )
    calls = "\n".join(f"  fine-bench {name} {example}".rstrip() for example in examples)
    return argparse.ArgumentParser(
        prog=f"fine-bench {name}",
        formatter_class=_Style,
        description=description,
        epilog="\n\n".join(
            part
            for part in (notes.strip(), f"Exit status:\n{meanings}", f"Examples:\n{calls}")
            if part
        ),
    )


def say(text: object, *, error: bool = False) -> None:
    """Print a line; see ``terminal.say``, which only a command that has something to say loads."""
    from fine_bench import terminal

    terminal.say(text, error=error)


def add_results(to: argparse.ArgumentParser) -> None:
    """``--results DIR``, the folder that a command reads."""
    to.add_argument(
        "--results", metavar="DIR", type=Path, default=Path("results"), help="default: results"
    )


def add_output(to: argparse.ArgumentParser, words: str, default: Path | None = None) -> None:
    """``--out`` and ``--force`` of a command that writes one file where the user says.

    ``store.files.check_output`` refuses before the work, ``write_output`` writes after it.
    """
    to.add_argument("--out", metavar="FILE", type=Path, default=default, help=words)
    to.add_argument("--force", action="store_true", help="replace FILE if it is there already")


def add_printing(to: argparse.ArgumentParser, formats: Sequence[str], words: str) -> None:
    """``--format`` and ``--task`` of a command that prints tables.

    Args:
        to: the parser.
        formats: what may be printed; the first is the default.
        words: what the formats are, for the help.
    """
    to.add_argument(
        "--format", choices=formats, default=formats[0], help=f"what is printed: {words}"
    )
    to.add_argument("--task", metavar="NAME", help="print the tables of one task only")


def at_home(arguments: Sequence[str]) -> list[str]:
    """Overrides of Hydra in which a folder's ``~`` is the home folder, as a shell would have it.

    A shell leaves the ``~`` of ``results_dir=~/x`` alone, since it does not begin the word; records
    and the log would lie in different folders then.
    """
    found = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in ("results_dir", "bank.folder") and value.startswith("~"):
            home = str(Path(value).expanduser())
            escaped = home.replace("\\", "\\\\").replace("'", "\\'")
            plain = re.fullmatch(r"[\w./-]+", home) is not None
            found.append(f"{key}={home}" if plain else f"{key}='{escaped}'")
        else:
            found.append(argument)
    return found


def print_as(kind: str, tables: Any, shown: Any) -> None:
    """Print tables as ``--format`` says.

    Args:
        kind: ``"table"``, ``"md"``, ``"csv"`` or ``"json"``.
        tables: the module that knows their looks: ``show``, ``to_markdown``, ``to_csv``, ….
        shown: what these functions take.
    """
    if kind == "table":
        tables.show(shown)
    else:
        sys.stdout.write(getattr(tables, _LOOKS[kind])(shown))


def write_tables(tables: Any, found: Any, results: Path) -> bool:
    """Write tables into the results folder by ``tables.write`` and say so; False if it refuses."""
    from fine_bench.store.files import StoreError

    try:
        written = tables.write(found, results)
    except StoreError as error:
        say(error, error=True)
        return False
    say("written: " + ", ".join(map(str, written)), error=True)
    return True


def add_packages(to: argparse.ArgumentParser, words: str) -> None:
    """``--allow-packages``; ``words`` says which packages, and what for."""
    to.add_argument("--allow-packages", metavar="PACKAGE", nargs="+", default=[], help=words)


def command(
    make_parser: Callable[[], argparse.ArgumentParser],
) -> Callable[[Callable[[argparse.Namespace], int]], Main]:
    """Make a function of parsed arguments the ``main`` of a command.

    A ``UserError`` becomes its message on the error stream and the status 2.
    """

    def decorate(function: Callable[[argparse.Namespace], int]) -> Main:
        def main(argv: Sequence[str] | None = None) -> int:
            arguments = make_parser().parse_args(argv)
            try:
                return function(arguments)
            except UserError as error:
                say(error, error=True)
                return REFUSED
            except KeyboardInterrupt:
                say("interrupted", error=True)
                return INTERRUPTED

        main.__doc__ = function.__doc__
        return main

    return decorate


def read_leaderboard(
    results: Path, task: str | None, bar: RecordBar, packages: Sequence[str] = ()
) -> tuple[Leaderboard, Leaderboard]:
    """The leaderboard of a results folder, and the part of it that is asked for.

    Args:
        results: the folder.
        task: show the tables of this one only; all without it.
        bar: shows how far the reading is.
        packages: besides ``fine_bench``, whose metrics get columns.

    Raises:
        UserError: no records, or no such task (the message names those that exist).
    """
    from fine_bench.leaderboard.build import build
    from fine_bench.retraining.oracles import limits_in
    from fine_bench.store.records import RecordStore

    store = RecordStore(results)
    board = build(store, bar.comparing, packages, limits_in(results))
    if not board.tables and not board.problems:
        raise UserError(
            f"no records below {store.records}. Make some with `fine-bench run`, or name the "
            "folder that holds records/ with --results DIR"
        )
    say(f"read: {store.sources}", error=True)
    check_name("task", task, {table.task for table in board.tables})
    return board, board if task is None else board.of_task(task)


def check_name(kind: str, name: str | None, known: set[str]) -> None:
    """Refuse a name that is not among the known ones; None is no name.

    Raises:
        UserError: the message names those that exist.
    """
    if name is not None and name not in known:
        raise UserError(f"no {kind} {name!r}; there are: {', '.join(sorted(known))}")
