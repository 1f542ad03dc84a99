"""A folder of images by class, ``FOLDER/CLASS/….png``: Pillow reads, damaged files are named."""

from __future__ import annotations

import io
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fine_bench.data.views import ImageView, View
from fine_bench.errors import DataError
from fine_bench.runner.clean.inputs.items import (
    Items,
    LeftOut,
    Written,
    finish,
    reason_of,
    some,
)

SUFFIXES = (".png", ".jpg", ".jpeg")
LARGEST_SIDE = 32
"""Images are made this small for the model unless ``image_size`` says otherwise."""
THUMBNAIL = 96


def is_image_folder(folder: Path) -> bool:
    """Whether a folder has folders with images in them."""
    return any(
        path.suffix.lower() in SUFFIXES
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".")
        for path in child.rglob("*")
    )


def png(array: NDArray[np.uint8]) -> bytes:
    """An image ``(height, width, channels)`` as PNG."""
    out = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(out, "PNG")
    return out.getvalue()


class _Folder:
    def __init__(self, folder: Path, files: Sequence[Path], labels: Sequence[str]) -> None:
        self.folder, self.files, self.labels = folder, files, labels

    def view(self, row: int) -> View:
        with Image.open(self.files[row]) as image:
            small = _eight_bits(image)
            small.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        small.save(out, "PNG")
        return ImageView(out.getvalue())

    def targets(self, keep: Sequence[int], labels: Mapping[int, Any]) -> dict[int, Path]:
        """Where each row's file goes in the copy; an unchanged one keeps its name."""
        found: dict[int, Path] = {}
        taken: set[Path] = set()
        for row in sorted(keep, key=lambda row: row in labels):
            label = str(labels.get(row, self.labels[row]))
            if label in ("", ".", "..") or "/" in label or "\\" in label or "\0" in label:
                raise DataError(f"the label {label!r} of row {row} cannot be the name of a folder")
            target = Path(label, *self.files[row].relative_to(self.folder).parts[1:])
            if target in taken:  # an image of this name is in the other class already
                target = target.with_name(f"{target.stem}--row{row}{target.suffix}")
            taken.add(target)
            found[row] = target
        return found

    def write(self, folder: Path, keep: Sequence[int], labels: Mapping[int, Any]) -> Written:
        copy = folder / "cleaned"
        targets = self.targets(keep, labels)
        for row, target in targets.items():
            (copy / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.files[row], copy / target)
        return Written(copy, sorted(keep, key=targets.__getitem__))


def read_image_folder(folder: Path, image_size: int | None = None) -> Items:
    """Every PNG and JPEG below the folders of ``folder``, whose names are the labels.

    Rows are the files in the order of their paths. Images of one size, none of whose sides passes
    32 pixels, stay as they are; others are scaled to a square. If all are grey they have one
    channel.

    Args:
        folder: of folders.
        image_size: side of the square, for the model only.

    Raises:
        DataError: no images, or too few that can be read.
    """
    files, labels, other = [], [], Counter[str]()
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        if child.name.startswith("."):
            continue
        for path in sorted(child.rglob("*")):
            if path.name.startswith(".") or path.is_dir():
                continue
            if path.suffix.lower() in SUFFIXES:
                files.append(path)
                labels.append(child.name)
            else:
                other[path.suffix.lower() or path.name] += 1
    loose = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(
            f"{folder} has no folders with .png or .jpg files; put the images of each class into a "
            "folder named as the class"
        )
    notes = []
    if other:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in other.most_common(5))
        notes.append(f"{sum(other.values())} file(s) that are no PNG or JPEG were skipped: {kinds}")
    if loose:
        notes.append(f"{len(loose)} image(s) in no class's folder were skipped: {some(loose)}")
    names = [str(path.relative_to(folder)) for path in files]
    images: list[Image.Image] = []
    rows: list[int] = []
    left_out = []
    for row, path in enumerate(files):
        try:
            images.append(_read(path, image_size))
            rows.append(row)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
            words = "no image" if isinstance(error, UnidentifiedImageError) else reason_of(error)
            left_out.append(LeftOut(row, names[row], f"cannot be read: {words}"))
    content = _stacked(images, image_size)
    shape = "no image" if not len(content) else "{}×{}×{}".format(*content.shape[1:])
    return finish(
        "images",
        f"{len(files)} images in {len(set(labels))} folders, as {shape} for the model",
        content,
        [labels[row] for row in rows],
        [names[row] for row in rows],
        _Folder(folder, files, labels),
        where=str(folder),
        rows=rows,
        n_source=len(files),
        left_out=left_out,
        notes=notes,
    )


def _read(path: Path, image_size: int | None) -> Image.Image:
    """An image, already small where it is a large one, so that many fit into memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.load()
            found = _eight_bits(image)
    side = image_size or LARGEST_SIDE
    if image_size is not None or max(found.size) > side:
        found = found.resize((side, side), Image.Resampling.BILINEAR)
    return found


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey or colours of 0 … 255; grey of more bits from its least value to its largest."""
    if image.mode in ("I;16", "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        span = float(values.max() - values.min()) or 1.0
        image = Image.fromarray(((values - values.min()) * (255 / span)).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _stacked(images: Sequence[Image.Image], image_size: int | None) -> NDArray[np.uint8]:
    if not images:
        return np.zeros((0, 1, 1, 1), dtype=np.uint8)
    if len({image.size for image in images}) > 1:
        side = image_size or LARGEST_SIDE
        images = [image.resize((side, side), Image.Resampling.BILINEAR) for image in images]
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    arrays = [np.asarray(image.convert(mode)) for image in images]
    stacked = np.stack(arrays)
    return stacked[..., None] if mode == "L" else stacked
