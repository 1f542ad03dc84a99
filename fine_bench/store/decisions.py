"""The decisions of a person about the rows of a data set: the csv that the review page saves.

Columns ``row`` (position in the data, from 0), ``name``, ``decision`` and ``label``. A cell that a
spreadsheet would take for a formula begins with an apostrophe there, which is taken off here.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fine_bench.errors import DataError
from fine_bench.terminal import visible

KINDS = ("accept", "reject", "relabel")
COLUMNS = ("row", "name", "decision", "label")
_MARKED = re.compile(r"'+\s*[=+\-@]")


@dataclass(frozen=True)
class Decision:
    """What a person says of a row.

    Attributes:
        row: position in the data.
        kind: ``accept`` (the given label is right), ``reject`` (remove the row) or ``relabel``.
        label: position of the right class in the classes; None for ``reject``.
    """

    row: int
    kind: str
    label: int | None


def read_decisions(
    path: Path, names: Sequence[str], labels: Sequence[int], class_names: Sequence[Hashable]
) -> list[Decision]:
    """Read and check a csv of decisions about these data.

    Args:
        path: the file; further columns are passed over.
        names: of all rows, as they stood in the table of the page.
        labels: given classes of all rows, positions in ``class_names``.
        class_names: all classes.

    Returns:
        The decisions by row.

    Raises:
        DataError: a file that is missing, no such csv, about other data, or that says two things
            of one row.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except Exception as error:  # whatever a damaged file sets off in pandas
        raise DataError(
            f"{path} cannot be read as a csv of decisions ({type(error).__name__}: {error}); save "
            "the decisions on the review page again"
        ) from error
    if any(name not in table.columns for name in COLUMNS):
        raise DataError(
            f"{path} has the columns {', '.join(map(visible, table.columns))}; decisions have "
            f"{', '.join(COLUMNS)}, as the review page saves them"
        )
    place = {visible(name): i for i, name in enumerate(class_names)}
    found: dict[int, Decision] = {}
    for number, cells in enumerate(zip(*(table[name] for name in COLUMNS), strict=True), start=2):
        text, name, kind, label = map(_unmarked, cells)
        where = f"{path}, line {number}"
        row = int(text) if re.fullmatch(r"\d{1,15}", text) else -1
        if not 0 <= row < len(names):
            raise DataError(
                f"{where}: row {visible(text)!r} is none of these data, which have rows 0 to "
                f"{len(names) - 1}; give the decisions about these data"
            )
        if name != visible(names[row]):
            raise DataError(
                f"{where}: row {row} is called {visible(names[row])} in these data and "
                f"{visible(name)} in the file; give the decisions about these data"
            )
        if kind not in KINDS:
            raise DataError(
                f"{where}: the decision is {visible(kind)!r}; write one of {', '.join(KINDS)}"
            )
        if kind == "relabel" and label not in place:
            raise DataError(
                f"{where}: {visible(label)!r} is none of the classes {', '.join(place)}"
            )
        at = {"accept": int(labels[row]), "reject": None}.get(kind, place.get(label))
        decision = Decision(row, kind, at)
        if found.setdefault(row, decision) != decision:
            raise DataError(
                f"{where}: row {row} was decided as {found[row].kind} further up; keep one line"
            )
    return [found[row] for row in sorted(found)]


def _unmarked(cell: str) -> str:
    return cell[1:] if _MARKED.match(cell) else cell


__all__ = ["KINDS", "Decision", "read_decisions"]
