"""Which form a path or an object has, and its items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fine_bench.errors import ConfigError, DataError
from fine_bench.runner.clean.inputs import arrays, hub, images, tables
from fine_bench.runner.clean.inputs.items import KINDS, Items, Kind

FORMS = (
    "a folder of images by class, a .csv, .parquet or .jsonl table, .npz or .npy arrays, or a "
    "folder saved by the library datasets"
)


def load(
    data: Any,
    *,
    kind: Kind | None = None,
    label: str | None = None,
    text: str | None = None,
    name: str | None = None,
    drop: Sequence[str] = (),
    split: str | None = None,
    image_size: int | None = None,
) -> Items:
    """Read data of any of the forms.

    Args:
        data: a path, a pandas ``DataFrame``, a ``Dataset`` or ``DatasetDict`` of ``datasets``, or
            ``(x, y)``.
        kind: what the rows are; None recognises it.
        label: column of the labels; for ``.npy`` the file of the labels.
        text: column of the texts.
        name: column that names the rows.
        drop: columns that the model must not see.
        split: of a ``DatasetDict``.
        image_size: side that images are scaled to for the model.

    Raises:
        ConfigError: options that do not fit the data.
        DataError: data that are missing, damaged or of no known form.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"--kind {kind} is unknown; it is one of {', '.join(KINDS)}")
    columns = {"label": label, "text": text, "name": name, "drop": drop}
    if isinstance(data, pd.DataFrame):
        _only(kind, ("table", "text"), "a data frame")
        frame = tables.named(data, "the data frame")
        return tables.table_items(frame, where="the data frame", kind=kind, **columns)  # type: ignore[arg-type]
    if isinstance(data, tuple):
        if len(data) != 2:
            raise ConfigError(f"(x, y) must be two arrays, got {len(data)} things")
        _only(kind, ("arrays", "images"), "a pair of arrays")
        return arrays.array_items(*data, where="(x, y)", kind=kind)
    if hasattr(data, "column_names"):
        return hub.dataset_items(data, where="the data set", split=split, kind=kind, **columns)  # type: ignore[arg-type]
    try:
        path = Path(data).expanduser()
        there = path.exists()
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"{data!r:.60} is no data; give {FORMS}") from error
    if not there:
        raise DataError(f"{path} is not there; check the path")
    _unused(path, split=split, image_size=image_size)
    if path.is_dir():
        if hub.is_saved_dataset(path):
            return hub.read_saved_dataset(path, split, kind=kind, **columns)
        _only(kind, ("images",), f"the folder {path}")
        _no_columns(path, "a folder of images", **columns)
        return images.read_image_folder(path, image_size)
    suffix = path.suffix.lower()
    if suffix in tables.SUFFIXES:
        _only(kind, ("table", "text"), str(path))
        frame = tables.read_table(path)
        return tables.table_items(frame, where=str(path), path=path, kind=kind, **columns)  # type: ignore[arg-type]
    if suffix in arrays.SUFFIXES:
        _only(kind, ("arrays", "images"), str(path))
        _no_columns(path, "a file of arrays", text=text, name=name, drop=drop)
        return arrays.read_arrays(path, label, kind)
    raise DataError(f"{path} is of no known form; give {FORMS}")


def _only(kind: Kind | None, possible: Sequence[Kind], where: str) -> None:
    if kind is not None and kind not in possible:
        raise ConfigError(
            f"--kind {kind} does not fit {where}, which can be {' or '.join(possible)}"
        )


def _no_columns(path: Path, what: str, **given: Any) -> None:
    options = {"label": "--label", "text": "--text", "name": "--id", "drop": "--drop"}
    for key, value in given.items():
        if value:
            raise ConfigError(f"{options[key]} names a column, but {path} is {what}; leave it out")


def _unused(path: Path, *, split: str | None, image_size: int | None) -> None:
    if split is not None and not (path.is_dir() and hub.is_saved_dataset(path)):
        raise ConfigError(f"--split goes with a folder of the library datasets, not with {path}")
    if image_size is not None:
        if not path.is_dir() or hub.is_saved_dataset(path):
            raise ConfigError(f"--image-size goes with a folder of images, not with {path}")
        if not 8 <= image_size <= 256:
            raise ConfigError(
                f"--image-size {image_size} is out of range 8 … 256; type for instance 32"
            )
