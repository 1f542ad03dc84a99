"""Which form a path or an object has, and its items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import pandas as pd

from fine_bench.errors import ConfigError, DataError
from fine_bench.runner.clean.inputs import arrays, hub, images, tables
from fine_bench.runner.clean.inputs.items import KINDS, Items, Kind, Reading

FORMS = (
    "a folder of images by class, a .csv, .parquet or .jsonl table, .npz or .npy arrays, or a "
    "folder saved by the library datasets"
)


def load(data: Any, **how: Unpack[Reading]) -> Items:
    """Read data of any of the forms.

    Args:
        data: a path, a pandas ``DataFrame``, a ``Dataset`` or ``DatasetDict`` of ``datasets``, or
            ``(x, y)``.
        how: see ``items.Reading``.

    Raises:
        ConfigError: options that do not fit the data.
        DataError: data that are missing, damaged or of no known form.
        TypeError: an option of another name.
    """
    odd = sorted(set(how) - set(Reading.__annotations__))
    if odd:
        raise TypeError(f"no option {odd[0]!r}; there are {', '.join(Reading.__annotations__)}")
    kind, label = how.get("kind"), how.get("label")
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"--kind {kind} is unknown; it is one of {', '.join(KINDS)}")
    if how.get("encoding") is not None and not _is_text(data):
        raise ConfigError(
            f"--encoding {how['encoding']} goes with .csv and .jsonl files, and with the labels of "
            "a .npy; leave it out"
        )
    if isinstance(data, pd.DataFrame):
        _only(kind, ("table", "text"), "a data frame")
        frame = tables.named(data, "the data frame")
        return tables.table_items(frame, how, where="the data frame")
    if isinstance(data, tuple):
        if len(data) != 2:
            raise ConfigError(f"(x, y) must be two arrays, got {len(data)} things")
        _only(kind, ("arrays", "images"), "a pair of arrays")
        return arrays.array_items(*data, where="(x, y)", kind=kind)
    if hasattr(data, "column_names"):
        return hub.dataset_items(data, how, where="the data set")
    try:
        path = Path(data).expanduser()
        there = path.exists()
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"{data!r:.60} is no data; give {FORMS}") from error
    if not there:
        raise DataError(f"{path} is not there; check the path")
    _unused(path, split=how.get("split"), image_size=how.get("image_size"))
    if path.is_dir():
        if hub.is_saved_dataset(path):
            return hub.read_saved_dataset(path, how)
        _only(kind, ("images",), f"the folder {path}")
        _no_columns(path, "a folder of images", how, ("label", "text", "name", "drop"))
        return images.read_image_folder(path, how.get("image_size"))
    suffix = path.suffix.lower()
    if suffix in tables.SUFFIXES:
        _only(kind, ("table", "text"), str(path))
        frame = tables.read_table(path, how.get("encoding"))
        return tables.table_items(frame, how, where=str(path), path=path)
    if suffix in arrays.SUFFIXES:
        _only(kind, ("arrays", "images"), str(path))
        _no_columns(path, "a file of arrays", how, ("text", "name", "drop"))
        return arrays.read_arrays(path, label, kind, how.get("encoding"))
    raise DataError(f"{path} is of no known form; give {FORMS}")


def _only(kind: Kind | None, possible: Sequence[Kind], where: str) -> None:
    if kind is not None and kind not in possible:
        raise ConfigError(
            f"--kind {kind} does not fit {where}, which can be {' or '.join(possible)}"
        )


def _is_text(data: Any) -> bool:
    return isinstance(data, str | Path) and Path(data).suffix.lower() in (".csv", ".jsonl", ".npy")


def _no_columns(path: Path, what: str, how: Reading, names: Sequence[str]) -> None:
    for name in names:
        if how.get(name):
            option = "--id" if name == "name" else f"--{name}"
            raise ConfigError(f"{option} names a column, but {path} is {what}; leave it out")


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
