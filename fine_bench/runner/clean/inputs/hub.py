"""Data sets of the hub's library ``datasets``: objects, and folders of ``save_to_disk``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fine_bench.data.views import View
from fine_bench.errors import ConfigError, DataError
from fine_bench.runner.clean.inputs import tables
from fine_bench.runner.clean.inputs.arrays import array_items
from fine_bench.runner.clean.inputs.items import Items, LeftOut, Reading, Written, finish, reason_of

MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets`` wrote this folder."""
    return any((folder / mark).is_file() for mark in MARKS)


class _Saved:
    """Shows rows as another origin does, and writes a copy as a folder of the same library."""

    def __init__(self, dataset: Any, label: str, items: Items) -> None:
        self.dataset, self.label, self.shown = dataset, label, items.origin
        self.first = {
            items.classes[k]: int(row) for row, k in zip(items.rows, items.y, strict=True)
        }

    def view(self, row: int) -> View:
        view: View = self.shown.view(row)
        return view

    def write(self, folder: Path, keep: Sequence[int], labels: Mapping[int, Any]) -> Written:
        feature = self.dataset.features[self.label]
        given = list(self.dataset[self.label])
        # as the data set has them: numbers of a ClassLabel, truth values, …
        for row, value in {row: given[self.first[label]] for row, label in labels.items()}.items():
            given[row] = value
        copy = folder / "cleaned"
        fresh = self.dataset.remove_columns(self.label).add_column(
            self.label, [given[row] for row in range(len(given))], feature=feature
        )
        fresh.select(list(keep)).save_to_disk(str(copy))
        return Written(copy, keep)


def read_saved_dataset(folder: Path, how: Reading) -> Items:
    """A folder that ``datasets`` wrote; see ``dataset_items`` for the options.

    Raises:
        ConfigError: the library is missing, or several splits without a choice.
        DataError: a damaged folder.
    """
    library = tables.require(
        "datasets", f"{folder} is a data set of the hub's library", "fine_bench[clean]"
    )
    try:
        found = library.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder sets off in it
        raise DataError(f"{folder} cannot be read ({reason_of(error)}); save it anew") from error
    return dataset_items(found, how, where=str(folder))


def dataset_items(dataset: Any, how: Reading, *, where: str) -> Items:
    """A ``Dataset``, or one split of a ``DatasetDict``, as items.

    A column of images makes images, one of text texts, others a table; numbers of a ``ClassLabel``
    become its names.

    Args:
        dataset: of the library.
        how: as ``tables.table_items``, and ``split``.
        where: for messages.

    Raises:
        ConfigError: an unknown split or column.
        DataError: nothing that can be used.
    """
    split = how.get("split")
    if isinstance(dataset, dict):
        chosen = split or ("train" if "train" in dataset else next(iter(dataset), None))
        if chosen not in dataset:
            raise ConfigError(f"{where} has no split {chosen!r}; it has {', '.join(dataset)}")
        dataset = dataset[chosen]
    elif split is not None:
        raise ConfigError(f"{where} has no splits; leave --split out")
    head = tables.named(pd.DataFrame(columns=dataset.column_names, index=[0]), where)
    label = tables.label_column(head, how.get("label"), where)
    feature = dataset.features[label]
    if hasattr(feature, "int2str"):
        labels = [
            None if value is None or value < 0 else feature.int2str(value)
            for value in dataset[label]
        ]
    else:
        labels = list(dataset[label])
    pictures = [c for c in dataset.column_names if type(dataset.features[c]).__name__ == "Image"]
    if pictures and how.get("kind") in (None, "images"):
        items = _images(dataset, pictures[0], labels, where)
    else:
        frame = dataset.remove_columns([*pictures, label]).to_pandas()
        frame[label] = labels
        items = tables.table_items(tables.named(frame, where), {**how, "label": label}, where=where)
    return Items(
        items.kind, items.what, items.content, items.rows, items.names, items.y, items.classes,
        _Saved(dataset, label, items), items.n_source, items.left_out, items.notes,
        items.table,
    )  # fmt: skip


def _images(dataset: Any, column: str, labels: Sequence[Any], where: str) -> Items:
    from fine_bench.runner.clean.inputs.images import LARGEST_SIDE

    left_out, rows, arrays = [], [], []
    pictures = []
    for row in range(len(dataset)):
        try:
            image = dataset[row][column]
            if image is None or labels[row] is None:
                raise ValueError("no image" if image is None else "no label")
            pictures.append(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
            rows.append(row)
        except Exception as error:  # Pillow's many
            left_out.append(LeftOut(row, str(row), f"cannot be used: {reason_of(error)}"))
    sizes = {image.size for image in pictures}
    small = len(sizes) == 1 and max(next(iter(sizes))) <= LARGEST_SIDE
    mode = "L" if all(image.mode == "L" for image in pictures) else "RGB"
    for image in pictures:
        fit = image if small else image.resize((LARGEST_SIDE, LARGEST_SIDE))
        array = np.asarray(fit.convert(mode))
        arrays.append(array[..., None] if mode == "L" else array)
    if not arrays:
        raise DataError(f"no image of {where} can be read; the first: {left_out[0].reason}")
    stacked = np.stack(arrays)
    given = [str(labels[row]) for row in rows]
    whole = array_items(stacked, np.array(given), where=where, kind="images")

    class Shown:
        def view(self, row: int) -> View:
            return whole.origin.view(rows.index(row))

    return finish(
        "images", f"{len(dataset)} images, column {column}", stacked, given,
        [str(row) for row in rows], Shown(),  # type: ignore[arg-type]  # _Saved writes
        where=where, rows=rows, n_source=len(dataset), left_out=left_out,
    )  # fmt: skip
