"""JSON lines: an object a line, read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fine_bench.errors import DataError
from fine_bench.runner.clean.inputs import csv_files

_HALF = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
"""A JSON escape of one half of a pair."""


def lines(path: Path, encoding: str | None) -> list[str]:
    """The lines of a file, without their ends."""
    # not splitlines: a text may hold other signs that end a line, such as U+2028
    return [line.removesuffix("\r") for line in csv_files.read_text(path, encoding).split("\n")]


def read(path: Path, encoding: str | None) -> pd.DataFrame:
    """A table of a file with an object a line; lines without anything are passed over.

    Raises:
        DataError: a line that is no JSON, no object, or no text, with its number.
    """
    rows = []
    for number, line in enumerate(lines(path, encoding), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is no JSON ({error}); correct it") from error
        half = _HALF.search(line)
        if half is not None and not _is_text(line):
            raise DataError(
                f"{path}, line {number} holds half of a character ({half.group()}, one of a pair "
                "that stands alone), which is no text; take it out or write the whole character"
            )
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number} holds a {type(row).__name__}; every line must be an object "
                'such as {"text": "…", "label": "…"}'
            )
        rows.append(row)
    return pd.DataFrame(rows)


def _is_text(line: str) -> bool:
    """Whether the pairs of a JSON line that make up one character each are whole."""
    try:
        json.dumps(json.loads(line), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def as_line(row: Mapping[str, Any], encoding: str) -> str:
    """A row as JSON; what the encoding does not have is escaped, as JSON may."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(row)
    return line
