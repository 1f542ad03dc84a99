"""Which items somebody has verified: positions, names, or a true/false column."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fine_bench.errors import ConfigError, DataError
from fine_bench.metrics.error_rate import Mask
from fine_bench.runner.clean.inputs.items import Items, some

_TRUE = {"true", "t", "yes", "y", "1", "1.0"}
_FALSE = {"false", "f", "no", "n", "0", "0.0"}
_HOW = "a text file of rows, counted from 0, or of names, one a line"


def trusted_items(items: Items, given: Any) -> Mask:
    """The verified items as a mask ``(n,)``.

    Args:
        items: all of them.
        given: the path of a text file with a row or a name a line, the name of a true/false column
            of the table, or rows and names themselves.

    Raises:
        ConfigError: neither file nor column.
        DataError: a row that is not there, was left out or is named twice; none, or all.
    """
    if isinstance(given, str | Path):
        name = str(given)
        column = items.table is not None and name in items.table.columns
        path = Path(given)
        if column and path.is_file():
            raise ConfigError(
                f"--trusted {name} is both a column and a file; write ./{name} for the file, or "
                "rename the column"
            )
        if column:
            mask = trusted_column(items.table[name], "the data")[items.rows]
            return _checked(mask, f"the column {name}")
        if not path.is_file():
            raise ConfigError(
                f"--trusted {name} is not a file"
                + ("" if items.table is None else " and no column of the data")
                + f"; give {_HOW}"
            )
        return _checked(_rows(items, _lines(path), str(path)), str(path))
    return _checked(_rows(items, [str(one) for one in given], "trusted"), "trusted")


def without_trusted(items: Items, given: Any) -> Items:
    """The items without the column that says which are trusted: a model must not see who is.

    Raises:
        DataError: no other column is left.
    """
    column = str(given) if isinstance(given, str | Path) else ""
    if items.kind != "table" or column not in items.content.columns:
        return items
    if items.content.shape[1] == 1:
        raise DataError(
            f"the data have no column to learn from besides the labels and {column}; add some"
        )
    notes = [*items.notes, f"the column {column} says which rows are trusted and was not used"]
    return replace(items, content=items.content.drop(columns=column), notes=notes)


def trusted_column(column: pd.Series[Any], where: object) -> Mask:
    """A true/false column as a mask, one entry a row.

    Raises:
        DataError: something else stands in it.
    """
    words = column.astype(str).str.strip().str.lower()
    unknown = ~words.isin(_TRUE | _FALSE)
    if unknown.any():
        raise DataError(
            f"the column {column.name!r} of {where} must be true or false everywhere, got "
            f"{words[unknown].iloc[0]!r} in row {int(unknown.argmax())} (rows count from 0)"
        )
    return np.asarray(words.isin(_TRUE).to_numpy(dtype=np.bool_), dtype=np.bool_)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error})") from error
    words = [line.strip() for line in lines if line.strip()]
    return words[1:] if words and words[0].lower() in ("row", "name", "index") else words


def _rows(items: Items, words: Sequence[str], where: str) -> Mask:
    by_name = {name: k for k, name in enumerate(items.names)}
    by_row = {int(row): k for k, row in enumerate(items.rows)}
    out = {one.row: one for one in items.left_out}
    mask = np.zeros(len(items), dtype=np.bool_)
    for word in words:
        # a row number counts before a name: names may be numbers of somebody's own
        k = by_row.get(int(word)) if word.isdecimal() else by_name.get(word)
        if k is None:
            left = out.get(int(word)) if word.isdecimal() else None
            left = left or next((one for one in items.left_out if one.name == word), None)
            if left is not None:
                raise DataError(
                    f"{where} names row {left.row} ({left.name}), which was left out: "
                    f"{left.reason}. Take it out of the list"
                )
            close = difflib.get_close_matches(word, list(by_name), n=1)
            raise DataError(
                f"{where} names {word!r}, which is no row (0 … {items.n_source - 1}) and no name"
                + (f"; did you mean {close[0]!r}?" if close else f", such as {some(items.names)}")
            )
        if mask[k]:
            raise DataError(f"{where} names {word!r} more than once; name each once")
        mask[k] = True
    return mask


def _checked(mask: Mask, where: str) -> Mask:
    if not mask.any():
        raise DataError(f"{where} names no row; verify some, drawn at random")
    if mask.all():
        raise DataError(f"{where} names all rows, so there is nothing left to judge")
    return mask
