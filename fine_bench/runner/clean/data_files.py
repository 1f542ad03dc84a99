"""The files that ``clean`` reads: labelled data, and which rows are trusted. Checked, no pickle."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.errors import ConfigError, DataError
from fine_bench.metrics.error_rate import Mask, trusted_mask
from fine_bench.runner.clean.inputs.arrays import read_npz
from fine_bench.runner.clean.inputs.csv_files import read_csv
from fine_bench.runner.clean.inputs.trusted import trusted_column


@dataclass(frozen=True, eq=False)
class LabelledData:
    """A user's data, ready for a network.

    Attributes:
        x: ``(n, ...)`` float32, standardised (``standardise``).
        y: ``(n,)`` int64 in 0 … n_classes - 1, positions in ``classes``.
        classes: the labels as they were given, ascending.
        trusted: ``(n,)`` boolean.
    """

    x: Tensor
    y: Tensor
    classes: Sequence[Any]
    trusted: Mask

    @property
    def single(self) -> list[Any]:
        """Labels that occur once."""
        counts = torch.bincount(self.y, minlength=len(self.classes))
        return [c for c, n in zip(self.classes, counts.tolist(), strict=True) if n == 1]


def read(data: Path, trusted: str, label: str | None) -> LabelledData:
    """Read and check both files.

    Args:
        data: ``.npz`` with arrays ``x`` and ``y``, or ``.csv`` with numeric features.
        trusted: a file of row positions, or the name of a column of the csv.
        label: name of the csv's label column.

    Raises:
        ConfigError: options that do not fit the file.
        DataError: a file that is missing, damaged or not as described.
    """
    suffix = data.suffix.lower()
    if suffix not in (".npz", ".csv"):
        raise ConfigError(f"--data {data} must be a .npz or .csv file; save it as one of these")
    if not data.is_file():
        raise DataError(f"--data {data} is not a file; check the path")
    if suffix == ".npz":
        if label is not None:
            raise ConfigError(
                f"--label {label} names a csv column, but {data} is a .npz, whose labels are its "
                "array y; leave --label out"
            )
        x, labels = _read_npz(data)
        _require_rows(len(x), data)
        mask = _trusted_from_file(trusted, len(x), f"{data} has no columns")
    else:
        x, labels, mask = _read_csv(data, trusted, label)
    classes, y = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError(
            f"all rows of {data} have the label {classes[0]}; a wrong label needs a second class"
        )
    if len(classes) > len(x) / 2:
        raise DataError(
            f"{data} has {len(classes)} different labels in {len(x)} rows; labels must be "
            "classes, most of them occurring more than once"
        )
    return LabelledData(
        standardise(x), torch.from_numpy(y.astype(np.int64)), classes.tolist(), mask
    )


def _require_rows(n: int, path: Path) -> None:
    if n < 2:
        raise DataError(f"{path} holds {n} row(s); there is nothing to compare")


def standardise(x: NDArray[Any]) -> Tensor:
    """To float32 with mean 0 and standard deviation 1.

    A table ``(n, features)`` column by column (a constant column becomes 0), anything with more
    axes (images) by the one mean and standard deviation of all its values.

    Raises:
        DataError: numbers so large that they have no standard deviation.
    """
    values = x.astype(np.float64)
    axes = (0,) if x.ndim == 2 else tuple(range(x.ndim))
    with np.errstate(over="ignore", invalid="ignore"):
        std = values.std(axis=axes, keepdims=True)
    if not np.isfinite(std).all():
        column = int(np.argwhere(~np.isfinite(std))[0][-1])
        where = f"feature {column} (counted from 0)" if x.ndim == 2 else "the values"
        raise DataError(
            f"{where} reach {np.abs(values[:, column] if x.ndim == 2 else values).max():.3g}, "
            "whose square is no number, so they cannot be standardised; divide them by their "
            "largest value, or drop what cannot be right"
        )
    values -= values.mean(axis=axes, keepdims=True)
    return torch.from_numpy((values / np.where(std > 0, std, 1.0)).astype(np.float32))


# ----------------------------------------------------------------------------------------- npz


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    x, y = read_npz(path)
    if x.dtype.kind not in "fiu" or x.ndim < 2:
        raise DataError(
            f"x of {path} must be numbers of shape (n, …), got {x.dtype} of shape {x.shape}; a "
            "single feature has shape (n, 1)"
        )
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise DataError(
            f"y of {path} must be whole numbers of shape (n,), got {y.dtype} of shape {y.shape}; "
            "number the classes"
        )
    if len(x) != len(y):
        raise DataError(f"x of {path} has {len(x)} rows, y {len(y)}; they must agree")
    bad = ~np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if bad.any():
        raise DataError(
            f"x of {path} has {int(bad.sum())} row(s) with values that are not finite, the first "
            f"at {int(bad.argmax())}; fill or drop them"
        )
    return x, y


# ----------------------------------------------------------------------------------------- csv


def _read_csv(path: Path, trusted: str, label: str | None) -> tuple[NDArray[Any], Any, Mask]:
    table = read_csv(path)
    columns = [str(c) for c in table.columns]
    table.columns = pd.Index(columns)
    if label is None:
        raise ConfigError(
            f"which column of {path} holds the labels? Add --label NAME, one of "
            f"{', '.join(columns[:20])}"
        )
    if label not in columns:
        close = difflib.get_close_matches(label, columns, n=1)
        raise ConfigError(
            f"{path} has no column {label!r}"
            + (f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(columns[:20])}")
        )
    _require_rows(len(table), path)
    labels = table[label]
    if labels.isna().any():
        raise DataError(
            f"{path} has {int(labels.isna().sum())} row(s) without a label, the first at "
            f"{int(labels.isna().argmax())} (rows count from 0); drop them"
        )
    drop = [label]
    if trusted in columns:
        if Path(trusted).is_file():
            raise ConfigError(
                f"--trusted {trusted} is both a column of {path} and a file; write ./{trusted} "
                "for the file, or rename the column"
            )
        mask = _checked(trusted_column(table[trusted], path), len(table), trusted)
        drop.append(trusted)
    else:
        mask = _trusted_from_file(trusted, len(table), f"no column of {path}")
    features = table.drop(columns=drop)
    if features.shape[1] == 0:
        raise DataError(f"{path} has no feature columns besides {', '.join(drop)}")
    wrong = [c for c in features.columns if not pd.api.types.is_numeric_dtype(features[c])]
    if wrong:
        raise DataError(
            f"the column(s) {', '.join(wrong[:10])} of {path} are not numbers; encode them as "
            "numbers or leave them out"
        )
    x = features.to_numpy(dtype=np.float64)
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise DataError(
            f"{path} has missing or infinite values, the first in row {row} (rows count from 0), "
            f"column {features.columns[column]}; fill or drop them"
        )
    if labels.dtype.kind not in "iub":
        labels = labels.astype(str)
    return x, labels.to_numpy(), mask


# ------------------------------------------------------------------------------------- trusted


def _trusted_from_file(name: str, n: int, otherwise: str) -> Mask:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"--trusted {name} is not a file, and {otherwise}; give a text file of row positions, "
            "counted from 0 and one a line, or a true/false column of a csv"
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text ({error})") from error
    if lines and not any(character.isdigit() for character in lines[0]):
        lines = lines[1:]  # a heading
    words = " ".join(lines).replace(",", " ").split()
    try:
        positions = np.array([int(word) for word in words], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{path} must hold row positions, whole numbers counted from 0, one a line ({error})"
        ) from error
    return _checked(positions, n, str(path))


def _checked(trusted: NDArray[Any], n: int, where: str) -> Mask:
    try:
        return trusted_mask(trusted, n)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
