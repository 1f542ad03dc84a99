"""Where the scripts write: refused before the work, whole or absent, nothing replaced unasked.

At its default place in the results folder a script rebuilds its own files, as the commands do with
their tables. Where the user names another place, ``store.files.write_output`` writes, and a file
that is there is replaced with ``--force`` only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

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


def add_force(parser: argparse.ArgumentParser) -> None:
    """``--force``, for a place that the user names."""
    parser.add_argument(
        "--force", action="store_true", help="replace files that are there, where you name a place"
    )
