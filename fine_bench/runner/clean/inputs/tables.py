"""Tables: CSV, Parquet, JSON lines and data frames; rows of numbers and categories, or texts."""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fine_bench.data.views import RowView, TextView, View
from fine_bench.errors import ConfigError, DataError, UserError
from fine_bench.runner.clean.inputs import csv_files, json_lines
from fine_bench.runner.clean.inputs.items import (
    Items,
    LeftOut,
    Reading,
    Written,
    finish,
    reason_of,
    some,
)

SUFFIXES = (".csv", ".parquet", ".jsonl")
LABELS = ("label", "labels", "target", "class", "y")
TEXTS = ("text", "sentence", "content", "review", "document", "body", "comment")
_WORDS = 4
"""A column is text when half of its values have as many words and most of them differ."""


def read_table(path: Path, encoding: str | None = None) -> pd.DataFrame:
    """A file as a data frame, its columns named by text.

    Args:
        path: of a form of ``SUFFIXES``.
        encoding: of text; UTF-8 for None.

    Raises:
        ConfigError: Parquet without the package that reads it.
        DataError: a damaged file.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        require("pyarrow", f"{path} is Parquet", "fine_bench[clean]")
    try:
        if suffix == ".csv":
            table = csv_files.read_csv(path, encoding)
        elif suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = json_lines.read(path, encoding)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file sets off below
        raise DataError(
            f"{path} cannot be read as a {suffix[1:]} table ({reason_of(error)}); write it anew"
        ) from error
    if suffix == ".csv" and not isinstance(table.index, pd.RangeIndex):
        # pandas takes the first cells for names of rows then, and shifts what stands below a name
        raise DataError(
            f"the rows of {path} have more cells than its first line has names; name each column "
            "there, or take a comma off the end of each row"
        )
    return named(table, path)


def named(table: pd.DataFrame, where: object) -> pd.DataFrame:
    """The table with text for column names.

    Raises:
        DataError: two columns of one name, or no rows.
    """
    table = table.reset_index(drop=True)
    table.columns = pd.Index([str(column) for column in table.columns])
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise DataError(f"{where} has two columns {twice[0]!r}; rename one")
    if not len(table):
        raise DataError(f"{where} holds no rows")
    return table


def require(package: str, because: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        ConfigError: it is not installed, with what to type.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{because}, which needs the package {package}; type: pip install '{extra}'"
        ) from error


# ------------------------------------------------------------------------------- which column


def find_column(table: pd.DataFrame, asked: str, option: str, where: object) -> str:
    """The column that an option names.

    Raises:
        ConfigError: there is none.
    """
    if asked in table.columns:
        return asked
    columns = [str(column) for column in table.columns]
    close = difflib.get_close_matches(asked, columns, n=1)
    raise ConfigError(
        f"{where} has no column {asked!r} ({option})"
        + (f"; did you mean {close[0]!r}?" if close else f"; it has {some(columns)}")
    )


def label_column(table: pd.DataFrame, asked: str | None, where: object) -> str:
    """The column of the labels: the one that was asked for, or one of the usual names.

    Raises:
        ConfigError: none or several of these.
    """
    if asked is not None:
        return find_column(table, asked, "--label", where)
    usual = [str(c) for c in table.columns if str(c).lower() in LABELS]
    if len(usual) != 1:
        raise ConfigError(
            f"which column of {where} holds the labels? Add --label NAME, one of "
            f"{', '.join(map(str, table.columns[:20]))}"
        )
    return usual[0]


def is_text(column: pd.Series[Any]) -> bool:
    """Whether a column holds sentences: half of the values of many words, most of them distinct."""
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_datetime64_any_dtype(column):
        return False
    values = column.dropna()
    values = values[values.map(lambda value: isinstance(value, str))]
    if len(values) < max(len(column) / 2, 1):
        return False
    words = values.str.count(r"\S+")
    return bool((words >= _WORDS).mean() >= 0.5 and values.nunique() > len(values) / 2)


def text_column(table: pd.DataFrame, asked: str | None, label: str, where: object) -> str | None:
    """The column of the texts; None when no column looks like one.

    Raises:
        ConfigError: several do, and none of them has a usual name.
    """
    if asked is not None:
        return find_column(table, asked, "--text", where)
    found = [str(c) for c in table.columns if str(c) != label and is_text(table[c])]
    usual = [name for name in found if name.lower() in TEXTS]
    if len(found) > 1 and len(usual) != 1:
        raise ConfigError(
            f"{where} has several columns of text, {some(found)}; choose one with --text NAME, or "
            "--kind table to take all columns as they are"
        )
    return next(iter(usual or found), None)


# --------------------------------------------------------------------------------- to items


class _Rows:
    """A table as an origin; ``path`` is read again for the copy, so that cells stay verbatim."""

    def __init__(
        self,
        table: pd.DataFrame,
        path: Path | None,
        label: str,
        text: str | None,
        classes: Mapping[int, Any],
        encoding: str | None = None,
    ) -> None:
        self.table, self.path, self.label, self.text = table, path, label, text
        self.encoding = encoding
        self.classes = classes

    def _as_given(self, given: Sequence[Any], labels: Mapping[int, Any]) -> dict[int, Any]:
        """New labels as the source writes them: ``true`` rather than "True", 007 rather than 7."""
        written = {label: given[row] for row, label in reversed([*self.classes.items()])}
        return {row: written[label] for row, label in labels.items()}

    def view(self, row: int) -> View:
        if self.text is not None:
            return TextView(str(self.table[self.text].iloc[row]))
        cells = self.table.iloc[row].drop(self.label)
        return RowView({str(name): value for name, value in cells.items()})

    def write(self, folder: Path, keep: Sequence[int], labels: Mapping[int, Any]) -> Written:
        form = csv_files.CsvForm()
        suffix = ".csv" if self.path is None else self.path.suffix.lower()
        copy = folder / f"cleaned{suffix}"
        if self.path is not None and suffix == ".jsonl":
            lines = [line for line in json_lines.lines(self.path, self.encoding) if line.strip()]
            found = [json.loads(line) for line in lines]
            given = self._as_given([one.get(self.label) for one in found], labels)
            encoding = self.encoding or csv_files.UTF_8
            for row, label in given.items():
                lines[row] = json_lines.as_line({**found[row], self.label: label}, encoding)
            copy.write_bytes("".join(f"{lines[row]}\n" for row in keep).encode(encoding))
            return Written(copy, keep)
        if self.path is not None and suffix == ".csv":
            table = csv_files.verbatim(self.path, self.encoding)
            table.columns = self.table.columns
            form = csv_files.csv_form(self.path, self.encoding)
        else:
            table = self.table.copy()
        column = table[self.label].astype(object)
        for row, label in self._as_given(column.tolist(), labels).items():
            column.iloc[row] = label
        table[self.label] = column.astype(table[self.label].dtype)
        table = table.iloc[list(keep)]
        if suffix == ".parquet":
            out = io.BytesIO()
            table.to_parquet(out, index=False)
            copy.write_bytes(out.getvalue())
        else:
            text = table.to_csv(sep=form.separator, index=False, lineterminator="\n")
            copy.write_bytes(csv_files.encoded(text, form.encoding, copy.name))
        return Written(copy, keep)


def table_items(
    table: pd.DataFrame, how: Reading, *, where: str, path: Path | None = None
) -> Items:
    """Rows of a table as items: texts if a column holds sentences, else numbers and categories.

    Args:
        table: all of it, its columns named by text.
        how: ``kind`` may be ``"text"`` or ``"table"``; without, the columns decide. ``label`` and
            ``text`` are found by their names or contents without.
        where: for messages.
        path: the file that it came from.

    Raises:
        ConfigError: options that do not fit the columns.
        DataError: nothing that can be used.
    """
    kind, text, name, drop = how.get("kind"), how.get("text"), how.get("name"), how.get("drop", ())
    label = label_column(table, how.get("label"), where)
    if name is not None:
        find_column(table, name, "--id", where)
    for column in drop:
        find_column(table, column, "--drop", where)
    unseen = [label, *([name] if name else []), *drop]
    if kind == "table" and text is not None:
        raise ConfigError(f"--text {text} does not go with --kind table; leave one of them out")
    chosen = None
    if kind != "table":
        seen = table[[c for c in table.columns if c in (label, text) or c not in unseen]]
        chosen = text_column(seen, text, label, where)
        if kind == "text" and chosen is None:
            raise ConfigError(
                f"no column of {where} looks like text; name it with --text, one of "
                f"{some([c for c in table.columns if c != label])}"
            )
        if chosen == label:
            raise ConfigError(f"--text {text} is the column of the labels; name another")
    labels = table[label]
    missing = labels.isna()
    if labels.dtype.kind not in "iub":
        missing |= labels.astype(str).str.strip() == ""
    names = table[name].astype(str).tolist() if name else [str(row) for row in range(len(table))]
    absent = np.flatnonzero(missing.to_numpy()).tolist()
    encoding = how.get("encoding")
    words = _words_for_none(path, encoding, table.columns.get_loc(label)) if absent else None
    left_out = [
        LeftOut(
            row,
            names[row],
            f"{words[row]} counts as no label; spell it otherwise if it is a class"
            if words is not None and words[row]
            else "no label",
        )
        for row in absent
    ]
    usable = ~missing.to_numpy()
    notes = _form_notes(path, encoding)
    features: pd.DataFrame | None = None
    if chosen is not None:
        texts = table[chosen].where(table[chosen].notna(), "").astype(str)
        empty = ~texts.str.contains(r"\w", regex=True).to_numpy()
        for row in np.flatnonzero(empty & usable):
            left_out.append(LeftOut(int(row), names[row], f"no word in {chosen}"))
        usable &= ~empty
    else:
        features, more = usable_columns(table.drop(columns=unseen), where)
        notes += more
    rows = np.flatnonzero(usable)
    given = labels.iloc[rows]
    whole = given.dtype.kind == "f" and bool(
        ((given == given.round()) & (given.abs() < np.inf)).all()
    )
    if given.dtype.kind in "iu" or whole:
        values: list[Any] = [int(value) for value in given]
    else:
        values = [str(value) for value in given]
    if chosen is not None:
        content: Any = [texts.iloc[row] for row in rows]
        what = f"{len(table)} texts, column {chosen}; labels: column {label}"
    else:
        assert features is not None
        content = features.iloc[rows].reset_index(drop=True)
        what = f"{len(table)} rows of {features.shape[1]} columns; labels: column {label}"
    return finish(
        "text" if chosen is not None else "table",
        what,
        content,
        values,
        [names[row] for row in rows],
        _Rows(table, path, label, chosen, dict(zip(rows.tolist(), values, strict=True)), encoding),
        where=where,
        rows=rows.tolist(),
        n_source=len(table),
        left_out=left_out,
        notes=notes,
        table=table,
    )


def _form_notes(path: Path | None, encoding: str | None) -> list[str]:
    if path is None or path.suffix.lower() != ".csv":
        return []
    return csv_files.csv_form(path, encoding).notes


def _words_for_none(path: Path | None, encoding: str | None, column: Any) -> list[str] | None:
    """What a CSV says in a column, NA and None included; None for other forms."""
    if path is None or path.suffix.lower() != ".csv":
        return None
    cells = csv_files.verbatim(path, encoding).iloc[:, column]
    return [str(cell).strip() for cell in cells]


def usable_columns(features: pd.DataFrame, where: object) -> tuple[pd.DataFrame, list[str]]:
    """The columns that a model can learn from, and what was done with the others.

    Numbers stay; infinite ones become missing. Truth values, text and categories are categories,
    days and times are numbers of days. Columns that say nothing (one value), name the rows (text
    that hardly repeats) or count them (each one more than the one before, as an index that was
    saved with the data) are left out: rows often stand class by class.

    Raises:
        DataError: no column is left.
    """
    kept: dict[str, pd.Series[Any]] = {}
    notes, alone, ids, counters = [], [], [], []
    for name in map(str, features.columns):
        column = features[name]
        if pd.api.types.is_datetime64_any_dtype(column):
            start = column.min()
            column = (column - start).dt.total_seconds() / 86400.0
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            column = column.astype("float64")
            infinite = np.isinf(column.to_numpy())
            if infinite.any():
                notes.append(
                    f"{int(infinite.sum())} infinite value(s) of column {name} count as missing, "
                    f"the first in row {int(infinite.argmax())}"
                )
                column = column.mask(infinite)
            whole = features[name].dtype.kind in "iu"
            if whole and len(column) > 2 and bool((column.diff().iloc[1:] == 1).all()):
                counters.append(name)
                continue
        else:
            column = column.map(lambda value: _word(value), na_action="ignore").astype(object)
            known = column.dropna()
            if len(known) > 20 and known.nunique() > 0.9 * len(known):
                ids.append(name)
                continue
        if column.nunique(dropna=False) < 2:
            alone.append(name)
            continue
        kept[name] = column
    if ids:
        notes.append(f"column(s) {some(ids)} differ in nearly every row and were not used")
    if counters:
        notes.append(f"column(s) {some(counters)} count the rows and were not used")
    if alone:
        notes.append(f"column(s) {some(alone)} hold one value only and were not used")
    if not kept:
        raise DataError(
            f"{where} has no column to learn from besides the labels"
            + (f" ({'; '.join(notes)})" if notes else "")
            + "; for texts name the column with --text"
        )
    missing = {name: int(c.isna().sum()) for name, c in kept.items() if c.isna().any()}
    if missing:
        shown = some([f"{name} ({n})" for name, n in missing.items()])
        first = int(np.flatnonzero(pd.DataFrame(kept).isna().any(axis=1).to_numpy())[0])
        notes.append(
            f"missing values in column(s) {shown}, the first in row {first}: the model is told "
            "that they are missing"
        )
    return pd.DataFrame(kept), notes


def _word(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value)).strip()
