"""CIFAR-10: 50,000 training and 10,000 test photographs of 32 × 32 pixels in ten classes.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, and the
*binary version* of its page: files of records of 3,073 bytes, one label byte and 1,024 bytes each
of red, green and blue, rows first.

A directory may hold the first few of the five training files only: then the data set is that much
smaller. Such files are not compared with published checksums, because a copy decoded from other
image files is as good for a benchmark; the data hash of a record tells them apart. The downloaded
archive is compared.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
import torch
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.data import downloads
from fine_bench.data.source import Source
from fine_bench.errors import DataError

N_CLASSES = 10
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
WHITE = 255
SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32

# of the pixels of all 50,000 training images, scaled to [0, 1]: red, green, blue
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

ARCHIVE = "cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
TEST_FILE = "test_batch.bin"
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
MIRRORS: tuple[str, ...] = ("https://www.cs.toronto.edu/~kriz/",)


class Cifar10(NamedTuple):
    """The four arrays: images ``(n, 3, 32, 32)`` uint8, labels ``(n,)`` uint8."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def cache() -> Path:
    """Where the downloaded archive is kept."""
    return downloads.cache_directory() / "cifar10"


def directories(data_dir: str | Path | None = None) -> list[Path]:
    """The user's places, in the order in which they are searched.

    In each of ``downloads.bases``: ``cifar10``, ``cifar10/cifar-10-batches-bin``,
    ``cifar-10-batches-bin`` (as the archive unpacks) and the directory itself.
    """
    parts = ("cifar10", f"cifar10/{FOLDER}", FOLDER, "")
    return [root / part for root in downloads.bases(data_dir) for part in parts]


def parse_records(content: bytes, source: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images ``(n, 3, 32, 32)`` and labels ``(n,)`` of an uncompressed binary file.

    Args:
        content: the whole file.
        source: how to name it in errors.

    Raises:
        DataError: not a whole number of records, or a label that is no class.
    """
    n, rest = divmod(len(content), RECORD)
    if n == 0 or rest:
        raise DataError(
            f"{source} has {len(content)} bytes, which is no whole number of images of {RECORD} "
            "bytes: it is truncated, or not of CIFAR-10's binary version. Replace it with an "
            "intact copy"
        )
    # a copy, because an array over immutable bytes is read-only, which torch warns about
    records = np.frombuffer(content, dtype=np.uint8).reshape(n, RECORD).copy()
    labels = records[:, 0]
    wrong = (labels >= N_CLASSES).nonzero()[0]
    if len(wrong):
        raise DataError(
            f"{source} has the label {labels[wrong[0]]} at image {wrong[0]}; CIFAR-10 has the "
            f"classes 0 … {N_CLASSES - 1}. The file is damaged, or not of the binary version"
        )
    return records[:, 1:].reshape(n, *SHAPE), labels


def load_cifar10(
    data_dir: str | Path | None = None,
    *,
    download: bool = True,
    mirrors: Sequence[str] | None = None,
) -> Cifar10:
    """Find (or download) CIFAR-10's binary version and read it.

    Looks in ``directories`` for the unpacked files, plain or gzip-compressed, then for the archive
    there and in the user's cache, then downloads the archive into the cache.

    Args:
        data_dir: searched first.
        download: whether the archive may be downloaded.
        mirrors: base addresses, tried in order; None means ``MIRRORS``.

    Raises:
        DataError: a file is damaged, or missing everywhere; the message names all places.
    """
    places = directories(data_dir)
    for place in places:
        if any(downloads.find(name, [place]) for name in (*TRAIN_FILES, TEST_FILE)):
            return _from_directory(place)
    for place in places:
        path = place / ARCHIVE
        if path.is_file():
            return _from_archive(_verified(path), path)
    path = _cached_archive(places, download, MIRRORS if mirrors is None else mirrors)
    return _from_archive(_verified(path), path)


def _from_directory(place: Path) -> Cifar10:
    found = [downloads.find(name, [place]) for name in TRAIN_FILES]
    n_files = next((k for k, path in enumerate(found) if path is None), len(found))
    test = downloads.find(TEST_FILE, [place])
    if n_files == 0 or any(found[n_files:]) or test is None:
        missing = TEST_FILE if test is None else TRAIN_FILES[n_files]
        raise DataError(
            f"{place} holds a part of CIFAR-10, but not {missing} (plain or .gz). It needs "
            f"{TEST_FILE} and the training files from {TRAIN_FILES[0]} on without a gap, in whose "
            "order labels of other people are counted. Add the file, or remove the others"
        )
    paths = [path for path in found[:n_files] if path is not None]
    parts = [parse_records(downloads.read_bytes(path), str(path)) for path in paths]
    return _joined(parts, parse_records(downloads.read_bytes(test), str(test)))


def _from_archive(raw: bytes, path: Path) -> Cifar10:
    """Read the members in memory: nothing of an archive is unpacked to disk."""
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as archive:
            contents = {
                name: member.read()
                for name in (*TRAIN_FILES, TEST_FILE)
                if (member := archive.extractfile(f"{FOLDER}/{name}")) is not None
            }
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it or replace it") from error
    parsed = {name: parse_records(c, f"{name} in {path}") for name, c in contents.items()}
    return _joined([parsed[name] for name in TRAIN_FILES], parsed[TEST_FILE])


def _joined(
    train: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    test: tuple[NDArray[np.uint8], NDArray[np.uint8]],
) -> Cifar10:
    images, labels = zip(*train, strict=True)
    return Cifar10(np.concatenate(images), np.concatenate(labels), *test)


def _verified(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions"
        ) from error
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != ARCHIVE_MD5:
        raise DataError(
            f"{path} is damaged: its MD5 ({len(raw)} bytes) is {found}, expected {ARCHIVE_MD5}. "
            "Nothing was trained on it. Replace it with an intact copy, or delete it: it is then "
            "looked for elsewhere and downloaded"
        )
    return raw


def _cached_archive(places: Sequence[Path], download: bool, mirrors: Sequence[str]) -> Path:
    """The archive in the cache; pooch verifies a download before it takes its place there."""
    path = cache() / ARCHIVE
    urls = [f"{mirror.rstrip('/')}/{ARCHIVE}" for mirror in mirrors]
    failures = []
    if not download:
        if path.is_file():
            return path
        urls = [f"{url} (not tried: download=False)" for url in urls]
    else:
        fetch = pooch.HTTPDownloader(timeout=downloads.TIMEOUT, chunk_size=1 << 16)
        for url in urls:
            try:
                return Path(
                    pooch.retrieve(
                        url, f"md5:{ARCHIVE_MD5}", ARCHIVE, path.parent, downloader=fetch
                    )
                )
            # requests derives its errors from OSError; a wrong checksum is a ValueError
            except (OSError, ValueError) as error:
                failures.append(f"{url}: {' '.join(str(error).split())}")
        urls = failures
    looked = [*(f"{place}/data_batch_1.bin[.gz] or {ARCHIVE}" for place in places), str(path)]
    raise DataError(
        "\n".join(
            [
                "CIFAR-10 (binary version) was not found. Looked at:",
                *(f"  {line}" for line in (*looked, *urls)),
                "Put the files or the archive into one of these directories, or set the "
                "environment variable FINE_BENCH_DATA to the directory that holds them"
                + ("." if download else ", or allow the download with task.download=true."),
            ]
        )
    )


def standardise_channels(images: NDArray[np.uint8]) -> Tensor:
    """``(pixel / 255 - mean_c) / std_c`` for each channel c, ``(n, 3, 32, 32)`` float32.

    Computed once for each level in float64 and looked up: the same bits on every machine.
    """
    levels = np.arange(WHITE + 1) / WHITE
    result = np.empty(images.shape, dtype=np.float32)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        table = ((levels - mean) / std).astype(np.float32)
        np.take(table, images[:, channel], out=result[:, channel], mode="clip")
    return torch.from_numpy(result)


def cifar_source(data_dir: str | Path | None = None, *, download: bool = True) -> Source:
    """CIFAR-10 as a task's source: all training images that are there, in the official order."""
    data = load_cifar10(data_dir, download=download)
    return Source(
        images=data.train_images,
        labels=data.train_labels.astype(np.int64),
        ids=np.arange(len(data.train_labels), dtype=np.int64),
        test_images=data.test_images,
        test_labels=data.test_labels.astype(np.int64),
        n_classes=N_CLASSES,
        to_input=standardise_channels,
    )
