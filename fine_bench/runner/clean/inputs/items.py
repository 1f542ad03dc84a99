"""Labelled items of any kind: what the readers make, and what they could not use, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from fine_bench.data.views import View
from fine_bench.errors import DataError

Kind: TypeAlias = Literal["images", "table", "text", "arrays"]
KINDS: tuple[Kind, ...] = ("images", "table", "text", "arrays")
NAMED = 5
"""How many rows or files a sentence names before it says how many more there are."""


class Reading(TypedDict, total=False):
    """How data are read; what is left out is recognised, or said to be needed.

    Keys:
        kind: what the rows are.
        label: column of the labels; for ``.npy`` the file of the labels.
        text: column of the texts.
        name: column that names the rows; their positions do without.
        drop: columns that the model must not see.
        split: of a ``DatasetDict``; ``train`` without, if it has one.
        image_size: side that images are scaled to for the model.
        encoding: of a text file, UTF-8 without.
    """

    kind: Kind | None
    label: str | None
    text: str | None
    name: str | None
    drop: Sequence[str]
    split: str | None
    image_size: int | None
    encoding: str | None


@dataclass(frozen=True)
class Written:
    """A copy that was written.

    Attributes:
        path: file or folder.
        rows: of the source, in the order in which the copy is read.
    """

    path: Path
    rows: Sequence[int]


class Origin(Protocol):
    """Where items come from: shows a row to people, and writes a copy with corrected labels."""

    def view(self, row: int) -> View:
        """Row ``row`` of the source, for the review page."""

    def write(self, folder: Path, keep: Sequence[int], labels: Mapping[int, Any]) -> Written:
        """Write the rows ``keep``, ascending, below ``folder``.

        Args:
            folder: exists; the copy is a new file or folder in it.
            keep: rows of the source.
            labels: row → the label to write in the place of the given one.
        """


@dataclass(frozen=True)
class LeftOut:
    """A row that cannot be used.

    Attributes:
        row: its position in the source, counted from 0.
        name: of the file or row.
        reason: why, for people.
    """

    row: int
    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Items:
    """Labelled items, all usable.

    Attributes:
        kind: what the model is chosen by.
        what: one line for people: what was read.
        content: ``(n, height, width, channels)`` uint8 for images, a data frame of ``n`` rows for a
            table, ``n`` texts, or an array ``(n, ...)``.
        rows: ``(n,)`` their positions in the source, ascending.
        names: ``n`` file names or row ids.
        y: ``(n,)`` int64, positions in ``classes``.
        classes: the labels as they were given, ascending.
        origin: shows and writes them.
        n_source: rows of the source, those that were left out among them.
        left_out: what could not be used.
        notes: what else the user should know.
        table: the whole source as a data frame where it is one; its columns may name trusted rows.
    """

    kind: Kind
    what: str
    content: Any
    rows: NDArray[np.int64]
    names: Sequence[str]
    y: NDArray[np.int64]
    classes: Sequence[Any]
    origin: Origin
    n_source: int
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = ()
    table: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.y)

    @property
    def labels(self) -> list[Any]:
        """The given labels, one an item."""
        return [self.classes[k] for k in self.y]


def some(names: Sequence[object]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:NAMED])
    more = len(names) - NAMED
    return shown + (f" and {more} more" if more > 0 else "")


def take(content: Any, keep: NDArray[np.int64]) -> Any:
    """The items ``keep`` of a content, whatever it is."""
    if hasattr(content, "iloc"):
        return content.iloc[keep].reset_index(drop=True)
    if isinstance(content, np.ndarray):
        return content[keep]
    return [content[k] for k in keep.tolist()]


def finish(
    kind: Kind,
    what: str,
    content: Any,
    labels: Sequence[Any],
    names: Sequence[str],
    origin: Origin,
    *,
    where: str,
    rows: Sequence[int] | None = None,
    n_source: int | None = None,
    left_out: Sequence[LeftOut] = (),
    notes: Sequence[str] = (),
    table: Any = None,
) -> Items:
    """Leave out labels that occur once, number the classes and check what is left.

    Args:
        kind, what, content, origin, notes, table: as in ``Items``.
        labels: ``n``, none missing.
        names: ``n``.
        where: the source, for messages.
        rows: their positions in the source; 0 … n − 1 without them.
        n_source: rows of the source; ``n`` without it.
        left_out: what the reader could not use.

    Raises:
        DataError: fewer than two classes or ten items are left, or labels that are no classes.
    """
    positions = np.arange(len(labels)) if rows is None else np.asarray(rows, dtype=np.int64)
    n_source = len(labels) if n_source is None else n_source
    out = list(left_out)
    counts = Counter(labels)
    if len(counts) > max(len(labels) / 2, 1):
        raise DataError(
            f"{where} has {len(counts)} different labels in {len(labels)} usable rows; labels must "
            "be classes, most of them occurring more than once. Name another column or folder"
        )
    once = np.array([counts[label] == 1 for label in labels], dtype=np.bool_)
    out += [
        LeftOut(
            int(positions[k]),
            str(names[k]),
            f"the label {labels[k]} occurs once, and no model learns a class from one row",
        )
        for k in np.flatnonzero(once).tolist()
    ]
    keep = np.flatnonzero(~once)
    kept = [labels[k] for k in keep.tolist()]
    try:
        classes: list[Any] = sorted(set(kept))
    except TypeError:  # numbers beside text
        kept = [str(label) for label in kept]
        classes = sorted(set(kept))
    if len(classes) < 2:
        raise DataError(
            f"{where} has {len(classes)} label(s) that occur at least twice"
            + (f" ({classes[0]})" if classes else "")
            + "; a wrong label needs a second class"
            + _because(out)
        )
    if len(kept) < 10:
        raise DataError(
            f"{where} holds {len(kept)} usable rows; at least 10 are needed" + _because(out)
        )
    number = {label: k for k, label in enumerate(classes)}
    return Items(
        kind,
        what,
        content if not once.any() else take(content, keep),
        np.asarray(positions[keep], dtype=np.int64),
        [str(names[k]) for k in keep.tolist()],
        np.array([number[label] for label in kept], dtype=np.int64),
        classes,
        origin,
        n_source,
        sorted(out, key=lambda one: one.row),
        list(notes),
        table,
    )


def _because(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return ""
    first = left_out[0]
    return (
        f". {len(left_out)} row(s) were left out, the first {first.name} (row {first.row}): "
        f"{first.reason}"
    )


def reason_of(error: BaseException) -> str:
    """What went wrong, where the error has no words of its own too."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
