"""CIFAR-10N: CIFAR-10's training images as people on a crowd-sourcing market labelled them.

Source: J. Wei, Z. Zhu, H. Cheng, T. Liu, G. Niu, Y. Liu, "Learning with Noisy Labels Revisited: A
Study Using Real-World Human Annotations", ICLR 2022. Licence of the labels: CC BY-NC 4.0.

Three people labelled every image. ``random1`` … ``random3`` are their labels (17-18 % wrong),
``aggre`` the majority's (9 %), ``worse`` a wrong one wherever anybody was wrong (40 %). Human
errors are not uniform: they concentrate on hard images and on classes that look alike.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fine_bench.data import downloads
from fine_bench.data.cifar import N_CLASSES, cache, cifar_source
from fine_bench.data.groups import mislabel_groups
from fine_bench.data.sampling import draw, task_data
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError, DataError

LabelSet: TypeAlias = Literal["aggre", "random1", "random2", "random3", "worse"]
COLUMNS: Mapping[LabelSet, str] = {
    "aggre": "aggre_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
    "worse": "worse_label",
}
CLEAN = "clean_label"
N_OFFICIAL = 50_000

ARRAYS = "CIFAR-10_human.npz"
OFFICIAL = "CIFAR-10_human.pt"
OFFICIAL_MD5 = "96644db5574813cae939af5f7f2a0aec"
MIRRORS: tuple[str, ...] = ("https://raw.githubusercontent.com/UCSC-REAL/cifar-10-100n/main/data/",)

CONVERT = (
    'python -c "import numpy, torch; '
    f"numpy.savez_compressed('{ARRAYS}', **torch.load('{OFFICIAL}', weights_only=False))\""
)

_Labels: TypeAlias = Mapping[str, NDArray[np.int64]]


def load_human_labels(
    data_dir: str | Path | None = None, *, download: bool = True
) -> tuple[_Labels, Path]:
    """All columns of the label file, and where it lies.

    Looks in ``cifar10n``, ``cifar10`` and the directory itself, below ``data_dir`` and
    ``FINE_BENCH_DATA``, for ``CIFAR-10_human.npz`` and the official ``CIFAR-10_human.pt``; then in
    the user's cache; then downloads the latter.

    Raises:
        DataError: the file is missing everywhere, damaged, or holds more than plain numbers.
    """
    parts = ("cifar10n", "cifar10", "")
    places = [base / part for base in downloads.bases(data_dir) for part in parts]
    for place in places:
        for name, read in ((ARRAYS, _read_arrays), (OFFICIAL, _read_official)):
            path = place / name
            if path.is_file():
                return _checked(read(downloads.read_bytes(path), path), path), path
    try:
        content, path = downloads.verified_content(
            OFFICIAL,
            OFFICIAL_MD5,
            directories=places,
            cache=cache(),
            urls=[f"{mirror.rstrip('/')}/{OFFICIAL}" for mirror in MIRRORS],
            download=download,
        )
    except DataError as error:
        raise DataError(
            f"{error}\n{ARRAYS}, the same arrays without a pickle, serves too."
        ) from error
    return _checked(_read_official(content, path), path), path


def _read_arrays(content: bytes, path: Path) -> Mapping[str, Any]:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is no archive of plain arrays ({error}); replace it with an intact copy"
        ) from error


def _read_official(content: bytes, path: Path) -> Mapping[str, Any]:
    """Read the official pickle without running anything in it.

    PyTorch's restricted unpickler refuses all functions and classes but those named here, which
    build an array of integers.
    """
    rebuild = np.zeros(0).__reduce__()[0]  # where it lives depends on the version of numpy
    allowed: list[Any] = [rebuild, np.ndarray, np.dtype]
    allowed += [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    allowed += [type(np.dtype(name)) for name in ("int64", "int32", "uint8")]
    try:
        with torch.serialization.safe_globals(allowed):
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes made up by somebody may fail in any way
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} is damaged, or holds more than plain arrays of integers; it was not loaded, "
            f"because unpickling can run code ({first_line}). If you trust it, convert it in its "
            f"directory: {CONVERT}"
        ) from error
    if not isinstance(found, dict):
        raise DataError(
            f"{path} holds a {type(found).__name__}, expected arrays by name as in the official "
            "CIFAR-10N; replace it"
        )
    return found


def _checked(found: Mapping[str, Any], path: Path) -> _Labels:
    arrays = {str(name): np.asarray(value) for name, value in found.items()}
    missing = [name for name in (CLEAN, *COLUMNS.values()) if name not in arrays]
    if missing:
        raise DataError(
            f"{path} has no {', '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}. "
            "Replace it with the official CIFAR-10N labels"
        )
    labels = {}
    for name in (CLEAN, *COLUMNS.values()):
        array = arrays[name]
        if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) != len(arrays[CLEAN]):
            raise DataError(
                f"{name} in {path} must hold one whole number an image, as many as {CLEAN} has "
                f"({len(arrays[CLEAN])}); got {array.dtype} of shape {array.shape}"
            )
        if len(array) and not 0 <= int(array.min()) <= int(array.max()) < N_CLASSES:
            raise DataError(
                f"{name} in {path} must lie in 0 … {N_CLASSES - 1}, got {array.min()} … "
                f"{array.max()}"
            )
        labels[name] = array.astype(np.int64)
    return labels


def match(labels: _Labels, image_labels: NDArray[np.int64], path: Path) -> _Labels:
    """The rows that belong to the images, refused unless they are in the images' order.

    Args:
        labels: columns of one length: as many as the images, or 50,000, of which the images are
            the first.
        image_labels: ``(n,)``, the labels beside the images themselves.
        path: of the label file.

    Raises:
        DataError: another length, or another order: the first position at which ``clean_label``
            is not the image's own label.
    """
    n, n_rows = len(image_labels), len(labels[CLEAN])
    if n_rows != n and not n < n_rows == N_OFFICIAL:
        raise DataError(
            f"{path} has {n_rows} labels for {n} training images; it must have as many, or the "
            f"official {N_OFFICIAL}, of which the images are the first. Use the labels that "
            "belong to these images"
        )
    wrong = (labels[CLEAN][:n] != image_labels).nonzero()[0]
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{path} is in another order than the images: at position {first} its {CLEAN} is "
            f"{labels[CLEAN][first]}, the image's own label is {image_labels[first]} ({len(wrong)} "
            f"of {n} differ). Use images in the official order of the binary version"
        )
    return {name: column[:n] for name, column in labels.items()}


def cifar10n(
    *,
    seed: int,
    labels: LabelSet = "aggre",
    n_train: int | None = 10_000,
    n_query: int = 500,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """CIFAR-10 with human labels, images ``(n, 3, 32, 32)``; bad are those that people got wrong.

    Args:
        seed: ``task.seed``: sample and queries. The label errors are what people made.
        labels: which of the human labels.
        n_train: number of training images; None takes all that are there.
        n_query: query images with their true labels, taken from the test images.
        data_dir: where to look for the files first.
        download: whether files found nowhere may be downloaded.

    Raises:
        ConfigError: anything impossible among these, with what to type instead.
        DataError: a file is damaged, missing everywhere, or does not fit the other.
    """
    if labels not in COLUMNS:
        raise ConfigError(
            f"task.labels={labels} is unknown; type task.labels=aggre, or one of "
            f"{', '.join(COLUMNS)}"
        )
    source = cifar_source(data_dir, download=download)
    columns, path = load_human_labels(data_dir, download=download)
    given = torch.from_numpy(match(columns, source.labels, path)[COLUMNS[labels]])
    sample = draw(source, seed=seed, n_train=n_train, n_query=n_query)
    y = given[sample.ids]
    for name, part in (("true", sample.y), ("human", y)):
        absent = sorted(set(range(N_CLASSES)) - set(part.tolist()))
        if absent:
            raise ConfigError(
                f"class {', '.join(map(str, absent))} never occurs among the {name} labels of "
                f"these {len(part)} images, so no run could learn it. Type a larger task.n_train "
                "(null for all images), or another task.seed"
            )
    x = source.to_input(sample.images)
    return task_data(
        "cifar10n",
        source,
        sample,
        x=x,
        y=y,
        is_bad=y != sample.y,
        kind="human label error",
        groups=mislabel_groups(x, sample.y, y, N_CLASSES, seed),
    )
