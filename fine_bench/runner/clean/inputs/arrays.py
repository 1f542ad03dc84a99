"""Arrays: ``.npz`` with x and y, ``.npy`` with labels beside it, or arrays in memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fine_bench.data.views import ImageView, RowView, View
from fine_bench.errors import ConfigError, DataError
from fine_bench.runner.clean.inputs.csv_files import read_text
from fine_bench.runner.clean.inputs.images import png
from fine_bench.runner.clean.inputs.items import Items, Kind, LeftOut, Written, finish, reason_of

SUFFIXES = (".npz", ".npy")
_SMALLEST, _LARGEST = 4, 512
_CELLS = 12


def as_images(x: NDArray[Any]) -> NDArray[Any] | None:
    """``x`` as ``(n, height, width, channels)`` if it can hold images, else None.

    ``(n, h, w)``, ``(n, c, h, w)`` and ``(n, h, w, c)`` with 1 or 3 channels and sides of 4 to 512.
    """
    if x.ndim == 3:
        x = x[..., None]
    elif x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        x = np.moveaxis(x, 1, -1)
    fits = x.ndim == 4 and x.shape[3] in (1, 3)
    sides = x.shape[1:3] if fits else (0, 0)
    return x if all(_SMALLEST <= side <= _LARGEST for side in sides) else None


class _Arrays:
    def __init__(
        self, x: NDArray[Any], y: NDArray[Any], given: Sequence[Any], images: NDArray[Any] | None
    ) -> None:
        self.x, self.y, self.given, self.images = x, y, given, images
        if images is not None:
            low, high = float(np.nanmin(images)), float(np.nanmax(images))
            # bytes are shown as they are, other numbers from the least to the largest
            self.low, self.span = (0.0, 255.0) if images.dtype == np.uint8 else (low, high - low)

    def view(self, row: int) -> View:
        if self.images is not None:
            values = np.nan_to_num(self.images[row].astype(np.float64), nan=self.low)
            grey = (values - self.low) * (255.0 / (self.span or 1.0))
            return ImageView(png(grey.clip(0, 255).astype(np.uint8)))
        flat = self.x[row].reshape(-1)
        return RowView({f"x[{k}]": float(value) for k, value in enumerate(flat[:_CELLS])})

    def write(self, folder: Path, keep: Sequence[int], labels: Mapping[int, Any]) -> Written:
        # as y has them: truth values stay truth values, bytes stay bytes
        first = {label: row for row, label in reversed(list(enumerate(self.given)))}
        y = self.y.copy()
        for row, label in labels.items():
            y[row] = self.y[first[label]]
        out = io.BytesIO()
        np.savez(out, x=self.x[list(keep)], y=y[list(keep)])
        copy = folder / "cleaned.npz"
        copy.write_bytes(out.getvalue())
        return Written(copy, keep)


def array_items(x: Any, y: Any, *, where: str, kind: Kind | None = None) -> Items:
    """Arrays as items: images where the shape is that of images, unless ``kind`` says otherwise.

    Args:
        x: ``(n, ...)`` numbers; a row with values that are not finite is left out and named.
        y: ``(n,)`` whole numbers or text.
        where: for messages.
        kind: ``"images"`` or ``"arrays"``; None decides by the shape.

    Raises:
        ConfigError: images were asked for, but the shape is another.
        DataError: arrays that do not fit.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype.kind not in "fiub" or x.ndim < 2:
        raise DataError(
            f"x of {where} must be numbers of shape (n, …), got {x.dtype} of shape {x.shape}; a "
            "single feature has shape (n, 1)"
        )
    if y.ndim != 1 or (y.dtype.kind not in "iubUO" and not _whole(y)):
        raise DataError(
            f"y of {where} must be whole numbers or text of shape (n,), got {y.dtype} of shape "
            f"{y.shape}; number the classes"
        )
    if len(x) != len(y):
        raise DataError(f"x of {where} has {len(x)} rows, y {len(y)}; they must agree")
    if not x.size:
        raise DataError(f"x of {where} has the shape {x.shape}, so it holds no number; check it")
    images = None if kind == "arrays" else as_images(x)
    if kind == "images" and images is None:
        raise ConfigError(
            f"--kind images needs x of shape (n, height, width), (n, channels, height, width) or "
            f"(n, height, width, channels) with 1 or 3 channels, got {x.shape}; use --kind arrays"
        )
    usable = np.isfinite(x.reshape(len(x), -1)).all(axis=1) if x.dtype.kind == "f" else None
    rows = np.arange(len(x)) if usable is None else np.flatnonzero(usable)
    left_out = [
        LeftOut(int(row), str(row), "values that are not finite")
        for row in np.setdiff1d(np.arange(len(x)), rows)
    ]
    given = [str(value) for value in y] if y.dtype.kind in "UO" else [int(value) for value in y]
    shape = "×".join(map(str, x.shape[1:]))
    content = (x if images is None else images)[rows]
    return finish(
        "arrays" if images is None else "images",
        f"{len(x)} arrays of {shape} numbers" + ("" if images is None else ", taken as images"),
        content,
        [given[row] for row in rows],
        [str(row) for row in rows],
        _Arrays(x, y, given, images),
        where=where,
        rows=rows.tolist(),
        n_source=len(x),
        left_out=left_out,
    )


def _whole(y: NDArray[Any]) -> bool:
    return y.dtype.kind == "f" and bool(np.isfinite(y).all() and (y == np.round(y)).all())


def read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """The arrays x and y of an archive, whatever they hold; nothing is unpickled.

    Raises:
        DataError: a damaged file, or one of the arrays is not there.
    """
    how = "write it with numpy.savez(path, x=features, y=labels)"
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = sorted(archive.files)
            if not {"x", "y"} <= set(found):
                raise DataError(
                    f"{path} holds the arrays {', '.join(found) or 'none'}, but x and y are "
                    f"needed; {how}"
                )
            return archive["x"], archive["y"]
    except DataError:
        raise
    except Exception as error:  # a damaged archive fails in zlib, tokenize, struct, memory, …
        raise DataError(
            f"{path} cannot be read as plain arrays ({reason_of(error)}); {how}, without objects "
            "among them"
        ) from error


def read_arrays(
    path: Path, label: str | None, kind: Kind | None = None, encoding: str | None = None
) -> Items:
    """Read ``.npz`` (x and y), or ``.npy`` with the labels in the file ``label``.

    Raises:
        ConfigError: ``label`` does not go with the file.
        DataError: a damaged file or other arrays.
    """
    if path.suffix.lower() == ".npz":
        if label is not None:
            raise ConfigError(
                f"--label {label} goes with tables, but {path} is a .npz, whose labels are its "
                "array y; leave --label out"
            )
        x, y = read_npz(path)
        return array_items(x, y, where=str(path), kind=kind)
    if label is None:
        raise ConfigError(
            f"{path} holds no labels; name a file of them with --label FILE: .npy, or text with "
            "one label a line"
        )
    return array_items(_npy(path), _label_file(Path(label), encoding), where=str(path), kind=kind)


def _npy(path: Path) -> NDArray[Any]:
    try:
        found = np.load(path, allow_pickle=False)
    except Exception as error:  # as above
        raise DataError(
            f"{path} cannot be read as a plain array ({reason_of(error)}); write it with "
            "numpy.save(path, array)"
        ) from error
    return np.asarray(found)


def _label_file(path: Path, encoding: str | None) -> NDArray[Any]:
    if not path.is_file():
        raise ConfigError(
            f"--label {path} is not a file; .npy arrays need one: .npy, or text with one label a "
            "line"
        )
    if path.suffix.lower() == ".npy":
        return _npy(path)
    return np.array([line.strip() for line in read_text(path, encoding).splitlines()])


__all__ = ["SUFFIXES", "array_items", "as_images", "read_arrays", "read_npz"]
