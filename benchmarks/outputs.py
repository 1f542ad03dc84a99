"""What the scripts write, and where: refused before the work, nothing replaced unasked.

At its default place in the results folder a script rebuilds its own files, as the commands do with
their tables. Where the user names another place, ``store.files.write_output`` writes, and a file
that is there is replaced with ``--force`` only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from fine_bench.metrics.intervals import Interval
from fine_bench.store import spreadsheet
from fine_bench.store.files import StoreError, check_output, write_atomic, write_output


class Outputs:
    """The files that one call of a script will write.

    Args:
        paths: all of them.
        default: whether the place is the script's own and not one that the user named.
        force: whether files that are there at another place may be replaced.

    Raises:
        SystemExit: with the reason, when one of them cannot be written; nothing was done yet.
    """

    def __init__(
        self, paths: Iterable[Path], *, default: bool = False, force: bool = False
    ) -> None:
        self.paths, self.default, self.force = tuple(paths), default, force
        self._written: set[Path] = set()
        try:
            for path in () if default else self.paths:
                check_output(path, force)
        except StoreError as error:
            raise SystemExit(str(error)) from error

    def write(self, path: Path, content: bytes | str | pd.DataFrame) -> None:
        """Write one of ``paths``; a table becomes a csv file, its fractions with four digits.

        Raises:
            ValueError: a file that was not announced, and so not looked at before the work.
            SystemExit: with the reason, when the disk refuses.
        """
        if path not in self.paths:
            raise ValueError(f"{path} is none of {', '.join(map(str, self.paths))}; announce it")
        if isinstance(content, pd.DataFrame):
            content = spreadsheet.to_csv(content, float_format="%.4f")
        data = content.encode() if isinstance(content, str) else content
        try:
            if self.default:
                write_atomic(path, data)
            else:
                # what this call has made it may make again, as its work goes on
                write_output(path, data, self.force or path in self._written)
        except StoreError as error:
            raise SystemExit(str(error)) from error
        self._written.add(path)


def table_files(
    name: str, out: Path, default: Path, *, force: bool = False
) -> tuple[Outputs, Path, Path]:
    """A table's files in a folder: both together, its ``.csv``, its ``.md``."""
    csv, page = (out / f"{name}.{ending}" for ending in ("csv", "md"))
    return Outputs((csv, page), default=out == default, force=force), csv, page


def seeds_and_files(
    name: str, about: str, seeds: int, default: Path, argv: Sequence[str] | None = None
) -> tuple[list[int], Outputs, Path, Path]:
    """The command line of a script that computes a table from seeds in one go.

    Args:
        name: of the table's files.
        about: the script's docstring, whose first line is its help.
        seeds: how many, where ``--seeds`` is not given.
        default: folder, where ``--out`` is not given.
        argv: the words; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    add_out(parser, default)
    arguments = parser.parse_args(argv)
    return arguments.seeds, *table_files(name, arguments.out, default, force=arguments.force)


def number_text(value: float, digits: int = 3) -> str:
    """``0.608``, or a dash where there is nothing to say."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def interval_text(mean: float, lower: float, upper: float) -> str:
    """``0.608 [0.601, 0.615]``; the mean alone, or a dash, where the rest is unknown."""
    if not math.isfinite(lower):
        return number_text(mean)
    return f"{mean:.3f} [{lower:.3f}, {upper:.3f}]"


def shown(value: Interval) -> str:
    """The mean of runs with its interval, as ``interval_text``."""
    return interval_text(value.mean, value.lower, value.upper)


def add_out(parser: argparse.ArgumentParser, default: Path) -> None:
    """``--out`` and ``--force`` of a script with a folder of its own."""
    parser.add_argument("--out", type=Path, default=default, help="folder to write into")
    add_force(parser)


def add_results(parser: argparse.ArgumentParser) -> None:
    """``--results``, ``--out`` and ``--force`` of a script that reads what runs left."""
    parser.add_argument("--results", metavar="DIR", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, help="where to write; the results folder otherwise")
    add_force(parser)


def add_force(parser: argparse.ArgumentParser) -> None:
    """``--force``, for a place that the user names."""
    parser.add_argument(
        "--force", action="store_true", help="replace files that are there, where you name a place"
    )


def made_earlier(table: Path, names: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """The ``.csv`` that a script wrote before, for rows whose scores are no longer at hand.

    Args:
        table: the file; no rows where there is none.
        names, numbers: its columns of text (empty where they say nothing) and of numbers (NaN).

    Raises:
        SystemExit: the file is another table; says what to do.
    """
    if not table.is_file():
        return pd.DataFrame(columns=[*names, *numbers])
    try:
        frame = pd.read_csv(table, dtype=str, keep_default_na=False)[[*names, *numbers]]
        return frame.assign(**{name: pd.to_numeric(frame[name]) for name in numbers})
    except (ValueError, KeyError) as error:
        raise SystemExit(
            f"{table} cannot be read as a table of this script ({error}); move it away, or name "
            "another folder with --results"
        ) from error
