"""The table of a review page: checked, ordered by rank, and as columns of JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd

from fine_bench.terminal import visible

NEEDED = (
    "row", "name", "label", "suggested", "score", "rank", "runs_found", "runs", "p_label",
    "mu", "mu_low", "mu_high",
)  # fmt: skip
OPTIONAL = ("repeats", "p_value", "covered")
NUMBERS = ("score", "p_label", "mu", "mu_low", "mu_high", "repeats", "p_value")
DIGITS = 4
"""Significant digits of the numbers in the page."""


def checked(table: pd.DataFrame, class_names: Sequence[Hashable]) -> pd.DataFrame:
    """The table by rank, its labels as positions in ``class_names``.

    Args:
        table: a line for each row of the data, with the columns ``NEEDED`` and any of
            ``OPTIONAL``. ``row``: position in the data, from 0; ``label``, ``suggested``: class
            names, the latter may be missing; ``rank``: 1 for the most suspicious; ``runs_found``
            of ``runs``: in how many runs the row was among the suspects; ``repeats``: the chance
            that a further run suspects it too; ``p_label``: probability
            of the given label; ``mu`` with the ends of its interval; numbers may be missing.
        class_names: all classes, each once.

    Returns:
        The columns that are there, by rank and then by row, ``suggested`` with -1 for none.

    Raises:
        ValueError: columns or values that are missing, repeated or unknown.
    """
    names = shown(class_names)
    if len(set(names)) < len(names) or not names:
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"class_names must name each class once, got {', '.join(twice) or 'none'}"
            f"{' more than once' if twice else ''}"
        )
    lost = [name for name in NEEDED if name not in table.columns]
    if lost:
        raise ValueError(
            f"the table of a review page lacks {', '.join(lost)}; it has "
            f"{', '.join(map(str, table.columns)) or 'no columns'} and needs {', '.join(NEEDED)}"
        )
    if table.empty:
        raise ValueError("the table of a review page has no rows; there is nothing to review")
    out = table[[*NEEDED, *(name for name in OPTIONAL if name in table.columns)]].copy()
    for name in ("row", "rank", "runs_found", "runs"):
        numbers = pd.to_numeric(out[name], errors="coerce")
        odd = numbers.isna() | (numbers != numbers.round()) | (numbers < 0)
        if odd.any():
            raise ValueError(
                f"{name} must be a whole number from 0 on, got {out[name][odd].iloc[0]!r} in line "
                f"{int(odd.to_numpy().argmax())} of the table"
            )
        out[name] = numbers.astype("int64")
    again = out["row"].duplicated()
    if again.any():
        raise ValueError(
            f"row {out['row'][again].iloc[0]} stands in the table more than once; each row of the "
            "data is decided about once"
        )
    place = {name: i for i, name in enumerate(names)}
    for name in ("label", "suggested"):
        given = out[name]
        none = given.isna() if name == "suggested" else pd.Series(False, index=given.index)
        at = given.map(lambda value: place.get(visible(value), -1)).where(~none, -1)
        odd = (at < 0) & ~none
        if odd.any():
            raise ValueError(
                f"{name} {given[odd].iloc[0]!r} of row {out['row'][odd].iloc[0]} is none of the "
                f"{len(names)} classes; class_names must hold every label"
            )
        out[name] = at.astype("int64")
    return out.sort_values(["rank", "row"], kind="stable").reset_index(drop=True)


def digest_of(table: pd.DataFrame, class_names: Sequence[Hashable]) -> str:
    """SHA-256 of rows, names, labels and classes: what decisions are about.

    Args:
        table: as ``checked`` returns it.
        class_names: all classes.
    """
    said = hashlib.sha256(json.dumps(shown(class_names)).encode())
    by_row = table.sort_values("row")
    for row, name, label in zip(by_row["row"], by_row["name"], by_row["label"], strict=True):
        said.update(json.dumps([int(row), visible(name), int(label)]).encode())
    return said.hexdigest()


def columns(table: pd.DataFrame) -> dict[str, Any]:
    """The table by columns: one value where all are equal, names left out where they are the row.

    Args:
        table: as ``checked`` returns it.
    """
    out: dict[str, Any] = {}
    for name in table.columns:
        if name in NUMBERS:
            values: list[Any] = [_short(value) for value in table[name].tolist()]
        elif name == "name":
            values = shown(table[name].tolist())
            if values == [str(row) for row in table["row"].tolist()]:
                continue
        elif name == "covered":
            values = [None if pd.isna(v) else bool(v) for v in table[name].tolist()]
        else:
            values = table[name].tolist()
        same = len(values) > 1 and all(value == values[0] for value in values[1:])
        out[name] = {"all": values[0]} if same else values
    return out


def shown(names: Sequence[Hashable]) -> list[str]:
    """Names as the page has them, and the csv that it saves: control characters written out."""
    return [visible(name) for name in names]


def _short(value: Any) -> float | None:
    """A number of few digits; None where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def data_block(value: Any) -> str:
    """JSON that may stand inside of ``<script>``: no ``<``, so that no tag begins or ends in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escaped = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028",
               "\u2029": "\\u2029"}  # fmt: skip
    for sign, code in escaped.items():
        text = text.replace(sign, code)
    # a lone surrogate has no UTF-8 form
    return text.encode("utf-8", "backslashreplace").decode()
