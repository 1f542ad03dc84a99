"""MNIST: 60,000 training and 10,000 test images of hand-written digits, 28 × 28 pixels.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE 86(11), 1998.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fine_bench.data import downloads
from fine_bench.data.idx import parse_idx
from fine_bench.data.mislabel import mislabel_task
from fine_bench.data.pixels import standardise
from fine_bench.data.source import Source
from fine_bench.data.task import TaskData

N_CLASSES = 10
WHITE = 255
# mean and standard deviation of all training pixels, scaled to [0, 1]
MEAN = 0.1307
STD = 0.3081

# file name → MD5 of the uncompressed content
FILES: Mapping[str, str] = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

# Each serves <file name>.gz below its address; tried in order.
MIRRORS: tuple[str, ...] = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


class Mnist(NamedTuple):
    """The four arrays: images ``(n, 28, 28)`` uint8, labels ``(n,)`` uint8."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def cache() -> Path:
    """Where downloaded files are kept."""
    return downloads.cache_directory() / "mnist"


def directories(data_dir: str | Path | None = None) -> list[Path]:
    """The user's places, in the order in which they are searched.

    In each of ``downloads.bases``: the sub-directory ``mnist``, the directory itself, and
    torchvision's ``MNIST/raw``.
    """
    parts = ("mnist", "", "MNIST/raw")
    return [root / part for root in downloads.bases(data_dir) for part in parts]


def load_mnist(
    data_dir: str | Path | None = None,
    *,
    download: bool = True,
    mirrors: Sequence[str] | None = None,
) -> Mnist:
    """Find (or download) the four files, verify their content, and read them.

    Args:
        data_dir: searched first; see ``directories``. The user's cache is searched last.
        download: whether files found nowhere may be downloaded into the user's cache.
        mirrors: base addresses, tried in order; None means ``MIRRORS``.

    Raises:
        DataError: a file is damaged, or missing everywhere; the message names all places.
    """
    places = directories(data_dir)
    arrays = []
    for name, md5 in FILES.items():
        content, path = downloads.verified_content(
            name,
            md5,
            directories=places,
            cache=cache(),
            urls=[
                f"{mirror.rstrip('/')}/{name}.gz"
                for mirror in (MIRRORS if mirrors is None else mirrors)
            ],
            download=download,
        )
        arrays.append(parse_idx(content, str(path)))
    return Mnist(*arrays)


def mnist_mislabel(
    *,
    seed: int,
    n_train: int | None = None,
    noise_rate: float = 0.2,
    n_query: int = 500,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """The mislabelling task on MNIST, images ``(n, 1, 28, 28)``.

    Args:
        seed: ``task.seed``: sample, flips and queries.
        n_train: number of training images; None takes all 60,000.
        noise_rate: share of training labels flipped uniformly to another class.
        n_query: clean query images, taken from the 10,000 test images.
        data_dir: where to look for the files first; see ``load_mnist``.
        download: whether files found nowhere may be downloaded.

    Raises:
        ConfigError: anything impossible among these, with what to type instead.
        DataError: a file is damaged, or missing everywhere.
    """
    data = load_mnist(data_dir, download=download)
    source = Source(
        images=data.train_images,
        labels=data.train_labels.astype(np.int64),
        ids=np.arange(len(data.train_images), dtype=np.int64),
        test_images=data.test_images,
        test_labels=data.test_labels.astype(np.int64),
        n_classes=N_CLASSES,
        to_input=partial(standardise, white=WHITE, mean=MEAN, std=STD),
    )
    return mislabel_task(
        "mnist_mislabel",
        source,
        seed=seed,
        n_train=n_train,
        noise_rate=noise_rate,
        n_query=n_query,
    )
