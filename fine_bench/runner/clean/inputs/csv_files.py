"""Text files as people save them: the sign between cells, decimal commas, the encoding.

Spreadsheets of many countries save "CSV" with semicolons and decimal commas, some programs with
tabs, and older ones in the encoding of their machine. The signs are recognised and said; an
encoding cannot be recognised with certainty, so another one than UTF-8 is asked for.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fine_bench.errors import ConfigError, DataError
from fine_bench.runner.clean.inputs.items import reason_of

UTF_8 = "utf-8"
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
"""Besides commas."""
_SAMPLE = 2**16
"""Bytes at the head of a file that its form is recognised by."""
_COMMA, _POINT = re.compile(r"[+-]?\d+,\d+"), re.compile(r"[+-]?\d+\.\d+")
_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True)
class CsvForm:
    """How a table is written.

    Attributes:
        separator: between cells.
        decimal: between units and tenths.
        encoding: of the text.
    """

    separator: str = ","
    decimal: str = "."
    encoding: str = UTF_8

    @property
    def notes(self) -> list[str]:
        """What is unusual, for people."""
        if self.separator == ",":
            return []
        tenths = " and decimal commas in its numbers" if self.decimal == "," else ""
        return [f"the file has {SEPARATORS[self.separator]} between its cells{tenths}"]


def checked_encoding(encoding: str | None) -> str:
    """The encoding to read with; UTF-8 for None.

    Raises:
        ConfigError: none that Python knows.
    """
    if encoding is None:
        return UTF_8
    try:
        "a".encode(encoding)
    except (LookupError, ValueError) as error:
        raise ConfigError(
            f"--encoding {encoding} is no encoding of text that Python knows; type for instance "
            "cp1252 (Windows), latin-1 or utf-16"
        ) from error
    return encoding


def csv_form(path: Path, encoding: str | None = None) -> CsvForm:
    """The form of a CSV file, by its head.

    Commas stand between the cells of a file whose first line has one outside of quotation marks.
    Otherwise it is the sign that gives the first line two cells or more, and every other line as
    many. Commas are decimal where cells such as 1,5 occur and none such as 1.5.

    Raises:
        ConfigError: an unknown encoding.
        OSError: the file cannot be read.
    """
    encoding = checked_encoding(encoding)
    with path.open("rb") as file:
        head = file.read(_SAMPLE + 1)
    whole = len(head) <= _SAMPLE
    text = head[:_SAMPLE].decode(encoding, errors="replace").lstrip("\ufeff")
    rows = _cells(text, ",", whole)
    if not rows or len(rows[0]) > 1:
        return CsvForm(encoding=encoding)
    found: dict[str, list[list[str]]] = {}
    for separator in SEPARATORS:
        rows = _cells(text, separator, whole)
        if rows and len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows):
            found[separator] = rows
    if not found:
        return CsvForm(encoding=encoding)
    separator = max(found, key=lambda sign: len(found[sign][0]))
    cells = [cell.strip() for row in found[separator][1:] for cell in row]
    decimal = any(map(_COMMA.fullmatch, cells)) and not any(map(_POINT.fullmatch, cells))
    return CsvForm(separator, "," if decimal else ".", encoding)


def _cells(text: str, separator: str, whole: bool) -> list[list[str]]:
    """The rows of a sample without empty ones, and without the last where it may be cut."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error:
        return []
    return [row for row in (rows if whole else rows[:-1]) if row]


def read_csv(path: Path, encoding: str | None = None, **options: Any) -> pd.DataFrame:
    """A CSV file of any recognised form as a data frame.

    Args:
        path: of the file.
        encoding: UTF-8 for None.
        options: of ``pandas.read_csv``.

    Raises:
        ConfigError: an unknown encoding.
        DataError: the file is in another encoding, or pandas cannot read it.
    """
    try:
        form = csv_form(path, encoding)
        table: pd.DataFrame = pd.read_csv(
            path, sep=form.separator, decimal=form.decimal, encoding=form.encoding, **options
        )
        return table
    except ConfigError:
        raise
    except Exception as error:  # whatever a damaged file sets off in pandas
        raise not_readable(path, error, encoding) from error


def verbatim(path: Path, encoding: str | None = None) -> pd.DataFrame:
    """The cells of a CSV file as they are written."""
    return read_csv(path, encoding, dtype=str, keep_default_na=False)


def read_text(path: Path, encoding: str | None = None) -> str:
    """A text file, without a mark of its byte order.

    Raises:
        ConfigError: an unknown encoding.
        DataError: it cannot be read, or is in another encoding.
    """
    try:
        # not read_text: what ends a line must stay as it is
        return path.read_bytes().decode(checked_encoding(encoding)).removeprefix("\ufeff")
    except (OSError, UnicodeError) as error:
        raise not_readable(path, error, encoding) from error


def encoded(text: str, encoding: str, name: str) -> bytes:
    """A table's text in the encoding of its source.

    Raises:
        DataError: it has no such character: a few encodings read what they cannot write.
    """
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        character = text[error.start]
        raise DataError(
            f"{name}, line {line}: {character!r} (U+{ord(character):04X}) cannot be written as "
            f"{encoding}, the --encoding of the data; nothing was written. Save the data as UTF-8 "
            "and leave --encoding out"
        ) from error


def not_readable(path: Path, error: Exception, encoding: str | None) -> DataError:
    """What to say of a file that cannot be read: for another encoding the line and the remedy."""
    if isinstance(error, UnicodeError):
        content = path.read_bytes()
        used = encoding or UTF_8
        try:
            content.decode(used)
        except UnicodeDecodeError as wrong:
            line = content.count(b"\n", 0, wrong.start) + 1
            byte = content[wrong.start]
            likely = _MARKS.get(content[:2])
            remedy = (
                f"it begins as {likely} does, so add --encoding {likely}"
                if likely and likely != used.lower()
                else "name its encoding, for instance --encoding cp1252 (Windows) or latin-1, or "
                "save it as UTF-8"
            )
            return DataError(
                f"{path}, line {line}, is not {used.upper()} (byte 0x{byte:02x} at {wrong.start}); "
                f"{remedy}"
            )
        except UnicodeError:  # utf-16 without its mark says no place
            pass
    kind = path.suffix.lower().removeprefix(".")
    what = f"a {kind} table" if kind in ("csv", "jsonl") else "text"
    return DataError(f"{path} cannot be read as {what} ({reason_of(error)}); write it anew")


__all__ = [
    "CsvForm", "checked_encoding", "csv_form", "encoded", "not_readable", "read_csv", "read_text",
    "verbatim",
]  # fmt: skip
