"""Tables as csv, in which a spreadsheet sees text where there is text.

A spreadsheet takes a cell that begins with =, +, - or @ for a formula, which may fetch or start
something. Names come from records and data of anybody, so such a cell gets an apostrophe in front,
which a spreadsheet takes for *this is text*. Numbers, also those written as text, stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from fine_bench.terminal import visible_lines

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf|[+-]")


def cell(value: Any) -> Any:
    """``value`` as it may stand in a csv file; only text changes."""
    if not isinstance(value, str):
        return value
    text = visible_lines(value)
    if text.lstrip()[:1] in ("=", "+", "-", "@") and not _NUMBER.fullmatch(text.strip()):
        return f"'{text}"
    return text


def to_csv(table: pd.DataFrame, **options: Any) -> str:
    """A table as csv, without its index.

    Args:
        table: what to write.
        options: of ``pandas.DataFrame.to_csv``.
    """
    safe = table.copy()
    for i, name in enumerate(table.columns):
        if not pd.api.types.is_numeric_dtype(table.dtypes.iloc[i]):
            safe[name] = table[name].map(cell)
    safe.columns = pd.Index([cell(name) for name in table.columns])
    return str(safe.to_csv(index=False, lineterminator="\n", **options))


__all__ = ["cell", "to_csv"]
